"""`amopo-fast demo`: trains the tiny model on the bundled data and shows what it learned on held-out pairs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from amopo_fast.data.pairs import read_pairs
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE, TRAIN_FILE, shuffled
from amopo_fast.demo.model import DEMO_TRAINING, demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.recipe import recipe_of_prompts
from amopo_fast.report.figure import plot_run
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.console import console_trainer


def demo_trainer(output_dir: str | Path, seed: int, *, shuffle_labels: bool = False, max_steps: int = -1):
    """The demo's trainer, before its first step. `shuffle_labels` is the control: nothing should be learned."""
    options = dict(DEMO_TRAINING)
    max_length = options.pop("max_length")
    tokenizer = demo_tokenizer()
    builder = PromptBuilder(tokenizer, DIMENSIONS, max_length=max_length)
    train, _ = read_pairs(TRAIN_FILE, dimensions=DIMENSIONS)
    heldout, _ = read_pairs(HELDOUT_FILE, dimensions=DIMENSIONS)
    if shuffle_labels:
        train = shuffled(train, seed)
    config = AMoPOConfig(
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        per_device_eval_batch_size=16,
        max_steps=max_steps,
        **options,
    )
    return console_trainer(
        demo_model(seed),
        config,
        dimensions=DIMENSIONS,
        train_dataset=builder.tokenize(train)[0],
        eval_dataset=builder.tokenize(heldout)[0],
        processing_class=tokenizer,
        recipe=recipe_of_prompts(builder, {"pairs": len(train), "sources": {TRAIN_FILE.name: f"{len(train)} pairs"}}),
    )


def run_demo(output_dir: str | Path, seed: int) -> int:
    """Train, print held-out accuracy before and after, write model, metrics.jsonl, metrics.png; exit code 0."""
    torch.set_num_threads(1)  # operations this small lose more to a second thread than they gain
    trainer = demo_trainer(output_dir, seed)
    before = trainer.evaluate()
    trainer.train()
    logged = reversed(trainer.state.log_history)
    after = next(line for line in logged if "eval_loss" in line)  # of the last epoch's end
    model_folder = Path(output_dir) / "model"
    trainer.save_model(str(model_folder))
    table = Table(title=f"Held-out accuracy, {len(trainer.eval_dataset)} pairs")
    for column in ("dimension", "before", "after"):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for name in (*DIMENSIONS, "mean"):
        key = f"eval_accuracy/{name}"
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}")
    console = Console()
    console.print(table)
    summary = Path(output_dir) / "demo.json"
    summary.write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n", encoding="utf-8")
    plot = plot_run(output_dir, Path(output_dir) / "metrics.png")
    for what, path in (("model", model_folder), ("metrics", Path(output_dir) / "metrics.jsonl"), ("plot", plot)):
        console.print(f"{what:8} {path}", soft_wrap=True)
    question = read_pairs(HELDOUT_FILE, dimensions=DIMENSIONS)[0][0].messages[-1].content
    ask = f'ask it   amopo-fast generate {model_folder} --target helpfulness=5 --prompt "{question}"'
    console.print(ask, soft_wrap=True)
    return 0

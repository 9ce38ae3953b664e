"""What low-bit optimizer states and bfloat16 weights cost in learning: AdamW variants on the demo's model and data.

    float32             float32 weights and states, the reference
    bf16 stochastic     bfloat16 weights rounded stochastically, float32 states
    8-bit, 4-bit        the same with quantised states
    bf16 to nearest     torch's AdamW over bfloat16 weights: what happens without stochastic rounding

Every variant sees the same batches in the same order for a seed, so losses are compared step by step. The learning
rate is constant and low against the weights' bfloat16 spacing (3e-4 against 1e-3 at weights of 0.15), as it is in
preference training of large models (3e-7 against 1e-4 at weights of 0.02).
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

import harness
from amopo_fast.data.pairs import read_pairs
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE, TRAIN_FILE
from amopo_fast.demo.model import DEMO_TRAINING, demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.optim.states import moment_bytes
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

LEARNING_RATE = 3e-4
STOCHASTIC = {"weight_precision": "bf16_stochastic"}
VARIANTS = {
    "float32": (torch.float32, "fp32", {}),
    "bf16 stochastic": (torch.bfloat16, "fp32", STOCHASTIC),
    "bf16 stochastic, 8-bit": (torch.bfloat16, "8bit", {**STOCHASTIC, "optim": "adamw_torch_8bit"}),
    "bf16 stochastic, 4-bit": (torch.bfloat16, "4bit", {**STOCHASTIC, "optim": "adamw_torch_4bit"}),
    "bf16 to nearest": (torch.bfloat16, None, {"weight_precision": "bf16"}),
}


class _StepTimes(TrainerCallback):
    def __init__(self):
        self.milliseconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.milliseconds.append(1e3 * (time.perf_counter() - self.begin))


def train(dtype: torch.dtype, options: dict, seed: int, steps: int, pairs_per_step: int, train_set, heldout, cpu: bool):
    """(losses, milliseconds of each step, held-out metrics)"""
    other = ("max_length", "num_train_epochs", "sft_coef")
    training = {name: value for name, value in DEMO_TRAINING.items() if name not in other}
    training |= {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10,
                 "pairs_per_step": pairs_per_step}  # fmt: skip
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = AMoPOConfig(
            output_dir=folder, seed=seed, max_steps=steps, use_cpu=cpu, save_strategy="no", logging_steps=1,
            disable_tqdm=True, per_device_eval_batch_size=16, report_to=[], bf16=False, **training, **options,
        )  # fmt: skip
        trainer = AMoPOTrainer(
            demo_model(seed).to(dtype), config, dimensions=DIMENSIONS, train_dataset=train_set, eval_dataset=heldout,
            callbacks=[times],
        )  # fmt: skip
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return losses, times.milliseconds, trainer.evaluate()


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs_per_step", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.seeds, arguments.pairs_per_step = 2, 1, 2
    report = harness.Report("optimizers", arguments)
    deadline = harness.Deadline(arguments.minutes)
    torch.set_num_threads(1)  # operations this small lose more to a second thread than they gain
    builder = PromptBuilder(demo_tokenizer(), DIMENSIONS, max_length=DEMO_TRAINING["max_length"])
    counts = (12, 4) if arguments.smoke else (None, None)
    train_set, heldout = (
        builder.tokenize(read_pairs(file, dimensions=DIMENSIONS)[0][:count])[0]
        for file, count in zip((TRAIN_FILE, HELDOUT_FILE), counts, strict=True)
    )
    parameters = [p.numel() for p in demo_model(0).parameters()]
    case = f"{arguments.steps} steps, {arguments.seeds} seeds"
    reference: list[list[float]] = []
    last = slice(-max(1, arguments.steps // 6), None)
    for name, (dtype, states, options) in VARIANTS.items():
        if deadline.over():
            report.add(case=case, variant=name, status="not run: no time left")
            continue
        runs = [
            train(dtype, options, seed, arguments.steps, arguments.pairs_per_step, train_set, heldout,
                  arguments.device == "cpu")
            for seed in range(arguments.seeds)
        ]  # fmt: skip
        losses = [loss for loss, _, _ in runs]
        reference = reference or losses
        behind = [
            statistics.mean(own[last]) - statistics.mean(full[last])
            for own, full in zip(losses, reference, strict=True)
        ]
        state_bytes = sum(4 * n if states is None else moment_bytes(n, states) for n in parameters)
        report.add(
            case=case, variant=name, status="ok",
            loss_at_end=statistics.mean(statistics.mean(each[last]) for each in losses),
            above_float32=statistics.mean(behind), above_float32_least=min(behind), above_float32_most=max(behind),
            heldout_margin=statistics.mean(metrics["eval_margin/mean"] for _, _, metrics in runs),
            heldout_accuracy=statistics.mean(metrics["eval_accuracy/mean"] for _, _, metrics in runs),
            bytes_per_parameter=torch.finfo(dtype).bits // 8 + state_bytes / sum(parameters),
            losses=[[round(loss, 5) for loss in each] for each in losses],
            **harness.summary([ms for _, times, _ in runs for ms in times[1:]]),
        )  # fmt: skip


if __name__ == "__main__":
    main()

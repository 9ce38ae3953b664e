"""README.md of a trained model's folder: what it was trained on, how it is asked for a dimension, what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.prompts.recipe import Recipe

_METRICS = ("loss", "accuracy/mean", "margin/mean")


def write_model_card(output_dir: str | Path, recipe: Recipe, state: TrainerState, *, adapter: bool) -> None:
    """README.md of a run's folder."""
    folder = Path(output_dir)
    plot = "metrics.png" if (folder / "metrics.png").is_file() else None
    text = model_card(recipe, state.log_history, name=folder.resolve().name, plot=plot, adapter=adapter)
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(recipe: Recipe, log: Sequence[dict[str, Any]], *, name: str, adapter: bool, plot: str | None) -> str:
    """The card as Markdown with the Hub's metadata before it.

    Args:
        log: the run's log lines (`trainer.state.log_history`).
        name: of the model, for its title. plot: file name of the run's picture, if it has one.
    """
    from huggingface_hub import ModelCardData

    base = recipe.base_model.get("name") or None
    meta = ModelCardData(
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation", base_model=base,
        tags=["amopo", "preference-optimization"], model_name=name,
    )  # fmt: skip
    scored = [dimension for dimension in recipe.dimensions if dimension != NO_OBJECT]
    parts = ["---", meta.to_yaml().strip(), "---", "", f"# {name}", ""]
    made = f"{'A LoRA adapter, trained over' if adapter else 'Trained from'} {f'`{base}`' if base else 'a model'}"
    parts += [
        f"{made} with amopo_fast on pairs of answers that are scored by dimension: {', '.join(scored) or 'none'}. "
        f"Objective: {_objective(recipe)} ([arXiv 2506.07165](https://arxiv.org/abs/2506.07165)).",
        "",
        "## Ask it for a dimension",
        "",
        *_usage(recipe, scored, name, adapter, base),
        "",
        "## Training",
        "",
    ]
    parts += [f"- {source}: {counts}" for source, counts in recipe.data.get("sources", {}).items()]
    parts += [f"- {recipe.data['pairs']:,} pairs an epoch, {_steps(log):,} optimizer steps"] if recipe.data else []
    parts += [f"- {', '.join(f'{package} {version}' for package, version in recipe.versions.items())}", ""]
    parts += _table(log)
    if plot:
        parts += ["", f"![Metrics of the run]({plot})"]
    parts += ["", "`amopo_recipe.json` holds the wording of the instructions and every setting that made the prompts."]
    return "\n".join(parts) + "\n"


def _objective(recipe: Recipe) -> str:
    options = ", ".join(f"{key} {value}" for key, value in recipe.objective.items() if key != "name")
    return f"{recipe.objective.get('name', 'amopo')} ({options})" if options else "amopo"


def _usage(recipe: Recipe, scored: Sequence[str], name: str, adapter: bool, base: str | None) -> list[str]:
    low, high = recipe.score_range
    asked = {"dimension": scored[0], "score": high if high % 1 else int(high)} if scored else {"dimension": "none"}
    arguments = ", ".join(f"{key}={json.dumps(value)}" for key, value in asked.items())
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "How do I boil an egg?"}],
        "chat_template_kwargs": asked,
    }
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    load = f'model = {kind}.from_pretrained("{name}")'
    lines = [
        '    messages = [{"role": "user", "content": "How do I boil an egg?"}]',
        f"    asked = dict({arguments}, add_generation_prompt=True, return_dict=True, return_tensors=\"pt\")",
        "    ids = tokenizer.apply_chat_template(messages, **asked)",
        "    print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))",
    ]
    served = f"{base} with this adapter" if adapter else "this folder"
    text = [
        f"With `{load}` and `tokenizer = AutoTokenizer.from_pretrained(\"{name}\")`:",
        "",
        *lines,
        "",
        f"Or with any server that hands `chat_template_kwargs` on, such as vLLM or `transformers serve` with {served}:",
        "",
        "    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"        -d '{json.dumps(body)}'",
        "",
    ]
    if scored:
        text.append(f"Scores go from {low:g} to {high:g}; dimensions are {', '.join(f'`{each}`' for each in scored)}.")
    if NO_OBJECT in recipe.dimensions:
        text.append("Without `dimension` the model is asked to be good in all of them.")
    return [*text, "`dimension=\"none\"` leaves the prompt as it is."]


def _steps(log: Sequence[dict[str, Any]]) -> int:
    return max((line["step"] for line in log if "step" in line), default=0)


def _table(log: Sequence[dict[str, Any]]) -> list[str]:
    """First and last values of training, last ones of every evaluation set."""
    training = [line for line in log if "loss" in line]
    rows = [(f"training, step {line['step']}", line, "") for line in [*training[:1], *training[-1:]]]
    sets = {key.removesuffix("accuracy/mean"): line for line in log for key in line
            if key.startswith("eval_") and key.endswith("accuracy/mean")}  # fmt: skip
    for prefix, line in sets.items():
        name = prefix[5:].rstrip("_")
        rows.append((f"held out{f' ({name})' if name else ''}, step {line['step']}", line, prefix))
    if not rows:
        return []
    lines = ["| | loss | accuracy | margin |", "|---|---|---|---|"]
    for title, line, prefix in rows:
        cells = [f"{line[prefix + key]:.3f}" if prefix + key in line else "" for key in _METRICS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines

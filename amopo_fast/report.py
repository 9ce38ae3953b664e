"""What a run leaves for the eye: a PNG of its metrics file, and the lines that the command line prints."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import ProgressCallback

PANELS = (("loss", "loss"), ("margin", "margin"), ("accuracy", "accuracy"), ("weight", "weight"))


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The lines of RUN/metrics.jsonl.

    Raises:
        FileNotFoundError: the folder has none.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the output_dir of a training run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_run(run: str | Path, output: str | Path) -> Path:
    """Loss and, per dimension, margins, accuracies and weights over steps; training thin, evaluation with dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    names = sorted({key.split("/", 1)[1] for line in lines for key in line if key.startswith("margin/")} - {"mean"})
    for axis, (panel, title) in zip(axes.flat, PANELS, strict=True):
        series = [""] if panel == "loss" else [f"/{name}" for name in names]
        for index, suffix in enumerate(series):
            color = f"C{index}"
            train = [(line["step"], line[panel + suffix]) for line in lines if panel + suffix in line]
            held_out = f"eval_{panel}{suffix}"
            evaluated = [(line["step"], line[held_out]) for line in lines if held_out in line]
            if train:
                axis.plot(*zip(*train, strict=True), color=color, alpha=0.35, linewidth=1)
                smooth = _smoothed([value for _, value in train])
                axis.plot([step for step, _ in train], smooth, color=color, label=suffix[1:] or "training")
            if evaluated:
                axis.plot(*zip(*evaluated, strict=True), color=color, marker="o", linestyle="--",
                          label="held out" if panel == "loss" else None)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(f"{Path(run).name}: training (line, smoothed) and held-out (dots)")
    output = Path(output)
    figure.savefig(output, dpi=120)
    plt.close(figure)
    return output


def _smoothed(values: list[float], keep: float = 0.85) -> list[float]:
    smooth, state, weight = [], 0.0, 0.0
    for value in values:
        state, weight = keep * state + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(state / weight)
    return smooth


class ConsoleProgress(ProgressCallback):
    """Trainer's progress bar with one short line per log instead of every metric; metrics.jsonl has them all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = f"step {state.global_step:>5}  loss {logs['loss']:.4f}"
            for name, key in (("margin", "margin/mean"), ("accuracy", "accuracy/mean")):
                shown += f"  {name} {logs[key]:.3f}" if key in logs else ""
            shown += f"  {logs.get('tokens_per_second/computed', 0):,.0f} tokens/s"
        elif "eval_loss" in logs:
            shown = f"step {state.global_step:>5}  held out: loss {logs['eval_loss']:.4f}"
            shown += f"  margin {logs['eval_margin/mean']:.3f}  accuracy {logs['eval_accuracy/mean']:.3f}"
        else:
            return
        self.training_bar.write(shown)

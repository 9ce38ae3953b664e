"""The lines that a training run prints."""

from __future__ import annotations

from transformers import ProgressCallback


class ConsoleProgress(ProgressCallback):
    """Trainer's progress bar with one short line per log instead of every metric; metrics.jsonl has them all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        line = train_line(state.global_step, logs) if "loss" in logs else eval_line(state.global_step, logs)
        if line:
            self.training_bar.write(line)


def train_line(step: int, logs: dict[str, float]) -> str:
    shown = f"step {step:>5}  loss {logs['loss']:.4f}"
    for name, key in (("margin", "margin/mean"), ("accuracy", "accuracy/mean")):
        shown += f"  {name} {logs[key]:.3f}" if key in logs else ""
    return shown + f"  {logs.get('tokens_per_second/computed', 0):,.0f} tokens/s"


def eval_line(step: int, logs: dict[str, float]) -> str | None:
    """One evaluation set's line; None where the logs are no evaluation's."""
    key = next((key for key in logs if key.startswith("eval_") and key.endswith("accuracy/mean")), None)
    if key is None:
        return None
    prefix = key.removesuffix("accuracy/mean")
    name = f" {prefix[5:-1]}" if prefix != "eval_" else ""
    shown = f"step {step:>5}  held out{name}: loss {logs.get(prefix + 'loss', float('nan')):.4f}"
    return shown + f"  margin {logs[prefix + 'margin/mean']:.3f}  accuracy {logs[key]:.3f}"

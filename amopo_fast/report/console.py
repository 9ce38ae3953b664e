"""The lines that a training run prints."""

from __future__ import annotations

import sys

from transformers import ProgressCallback, TrainerCallback


def console_callback(bar: bool) -> TrainerCallback:
    """One short line per log instead of every metric; metrics.jsonl has them all. With `bar`, and where a person looks
    at the terminal, below Trainer's progress bar."""
    return _LinesAndBar() if bar and sys.stderr.isatty() else _Lines()


class _Lines(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := _line(state.global_step, logs or {})):
            print(line, flush=True)


class _LinesAndBar(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and (line := _line(state.global_step, logs or {})):
            self.training_bar.write(line)


def _line(step: int, logs: dict[str, float]) -> str | None:
    return train_line(step, logs) if "loss" in logs else eval_line(step, logs)


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

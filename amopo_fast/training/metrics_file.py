"""metrics.jsonl: one JSON object per log line, rebuilt from the checkpoint on a resume."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from amopo_fast.report.runs import METRICS_FILE
from amopo_fast.survival import checkpoints, durable


class MetricsFile(TrainerCallback):
    """Appends every log line. On a resume the file becomes the checkpoint's own log, so that no line is missing, cut
    off or there twice, whatever happened to the file; a new run sets an earlier run's file aside."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not state.global_step and self.path.exists() and '"loss"' in self.path.read_text(encoding="utf-8"):
            checkpoints.set_aside(self.path.parent, [self.path])
        durable.write_text(self.path, "".join(_line(entry) for entry in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, "epoch": state.epoch, **logs}))


def _line(entry: dict) -> str:
    step, epoch = entry["step"], entry.get("epoch")
    rest = {key: value for key, value in entry.items() if key not in ("step", "epoch")}
    return json.dumps({"step": step, "epoch": epoch, **rest}) + "\n"

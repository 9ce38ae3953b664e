"""metrics.jsonl: one JSON object per log line, made to agree with the checkpoint on a resume.

A checkpoint's trainer_state.json holds the first and the last KEPT - 1 lines: all of them would grow by 3 KB a step,
and be written again with every checkpoint.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers import TrainerCallback

from amopo_fast.report.runs import METRICS_FILE
from amopo_fast.survival import checkpoints, durable

logger = logging.getLogger(__name__)

KEPT = 256


class MetricsFile(TrainerCallback):
    """Appends every log line. On a resume the file becomes the log of the checkpoint: its last lines are the
    checkpoint's own, whatever happened to the file, those before them the file's. A new run sets an earlier run's file
    aside. A full disk ends no run: lines wait until they can be written."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / METRICS_FILE
        self._waiting: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        if not state.global_step and '"loss"' in old:
            checkpoints.set_aside(self.path.parent, [self.path])
        lines = [_line(entry) for entry in state.log_history]
        if len(lines) >= KEPT:
            lines = [*self._before(state.log_history, old.splitlines()), *lines[1:]]
        self._waiting = []
        durable.write_text(self.path, "".join(lines))

    def _before(self, history: list[dict], old: list[str]) -> list[str]:
        """The file's lines before the checkpoint's own, of which there are KEPT."""
        first = json.loads(_line(history[1]))
        for number, text in enumerate(old):
            try:
                if json.loads(text) == first:
                    return [line + "\n" for line in old[:number]]
            except ValueError:
                break
        logger.warning("%s lacks lines of the run before step %d: they are lost", self.path, first["step"])
        return [_line(history[0])]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if len(state.log_history) > KEPT:
            del state.log_history[1:-KEPT + 1]
        if not (state.is_world_process_zero and logs):
            return
        self._waiting.append(_line({"step": state.global_step, "epoch": state.epoch, **logs}))
        try:
            durable.append(self.path, "".join(self._waiting).encode())
        except OSError as error:
            if len(self._waiting) == 1:
                logger.warning("%s cannot be written (%s): training goes on, and the lines are written when there is "
                               "room; free some", self.path, error.strerror)  # fmt: skip
        else:
            self._waiting = []


def _line(entry: dict) -> str:
    step, epoch = entry["step"], entry.get("epoch")
    rest = {key: value for key, value in entry.items() if key not in ("step", "epoch")}
    return json.dumps({"step": step, "epoch": epoch, **rest}) + "\n"

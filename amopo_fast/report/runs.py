"""What training runs left behind: their metrics as series by name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.jsonl"

Points = list[tuple[float, float]]  # (optimizer step, value)


@dataclass(frozen=True)
class Run:
    """A run's name and the lines of its metrics file, in order."""

    name: str
    lines: list[dict[str, float]]

    def points(self, key: str) -> Points:
        """(step, value) of every line that has the metric as a finite number."""
        return [
            (line["step"], line[key])
            for line in self.lines
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        ]

    @property
    def dimensions(self) -> list[str]:
        """In the order in which the run logs them, which is the configuration's."""
        names = {}
        for line in self.lines:
            for key in line:
                head, found, name = key.rpartition("margin/")
                if found and name != "mean" and (not head or head.startswith("eval_")):
                    names[name] = None
        return list(names)

    @property
    def eval_sets(self) -> list[str]:
        """Prefixes of the evaluation metrics: "eval_", or "eval_NAME_" for each of several sets."""
        found = {}
        for line in self.lines:
            for key in line:
                if key.startswith("eval_") and key.endswith("margin/mean"):
                    found[key.removesuffix("margin/mean")] = None
        return list(found)


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The lines of RUN/metrics.jsonl; a last line that a kill cut off is left out.

    Raises:
        FileNotFoundError: the folder has none. ValueError: a line before the last is no JSON object with a step.
    """
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the output_dir of a training run")
    lines = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), (int, float)):
                raise ValueError
        except ValueError:
            if number == len(texts):
                break
            raise ValueError(f"{path}, line {number}: no JSON object with a step; remove the line") from None
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no lines yet; train at least one logging step")
    return lines


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs by the shortest ends of their paths that tell them apart.

    Raises as `read_metrics`, and ValueError for a folder given twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is named twice")
    for depth in range(1, 64):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [Run(name, read_metrics(path)) for name, path in zip(names, paths, strict=True)]


def smoothed(points: Points, keep: float = 0.85) -> Points:
    """Exponential mean without the bias of its beginning."""
    smooth, state, weight = [], 0.0, 0.0
    for step, value in points:
        state, weight = keep * state + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, state / weight))
    return smooth

"""What training runs left behind: their metrics as series by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from amopo_fast.report.curves import Points, smoothed

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A run's name and the lines of its metrics file, in order."""

    name: str
    lines: list[dict[str, float]]
    _smooth: dict[str, Points] = field(default_factory=dict, init=False, repr=False, compare=False)

    def points(self, key: str) -> Points:
        """(step, value) of every line that has the metric as a finite number."""
        return self._columns[0].get(key, [])

    def smooth(self, key: str) -> Points:
        """`points`, smoothed where there are enough of them."""
        if key not in self._smooth:
            self._smooth[key] = smoothed(self.points(key))
        return self._smooth[key]

    def not_finite(self, key: str) -> list[float]:
        """Steps at which the metric was NaN or infinite."""
        return [step for step, _ in self._columns[1].get(key, [])]

    @property
    def last_step(self) -> float:
        return self.lines[-1]["step"]

    @cached_property
    def keys(self) -> list[str]:
        """Of all metrics, in the order in which they come up."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key not in ("step", "epoch")))

    @cached_property
    def _columns(self) -> tuple[dict[str, Points], dict[str, Points]]:
        """The metrics' finite numbers, and the others."""
        found: tuple[dict[str, Points], dict[str, Points]] = {}, {}
        for line in self.lines:
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    found[not math.isfinite(value)].setdefault(key, []).append((line["step"], value))
        return found

    @property
    def dimensions(self) -> list[str]:
        """In the order in which the run logs them, which is the configuration's."""
        names = {}
        for key in self.keys:
            head, found, name = key.rpartition("margin/")
            if found and name != "mean" and (not head or head.startswith("eval_")):
                names[name] = None
        return list(names)

    @property
    def eval_sets(self) -> list[str]:
        """Prefixes of the evaluation metrics: "eval_", or "eval_NAME_" for each of several sets."""
        end = "margin/mean"
        return [key.removesuffix(end) for key in self.keys if key.startswith("eval_") and key.endswith(end)]


def set_name(prefix: str) -> str:
    """ "evaluation", or "evaluation: NAME" for one of several sets."""
    return "evaluation" if prefix == "eval_" else f"evaluation: {prefix[5:-1]}"


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
        raise ValueError(f"{path} holds no whole line; train at least one logging step")
    return lines


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs by the shortest ends of their paths that tell them apart.

    Raises as `read_metrics`, and ValueError for a folder given twice.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is named twice: name each once")
    for depth in range(1, 64):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [Run(name, read_metrics(path)) for name, path in zip(names, paths, strict=True)]

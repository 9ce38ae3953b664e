"""What a run gains in one dimension against what it gives up in another: the Pareto picture of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from amopo_fast.report import marks
from amopo_fast.report.curves import Points
from amopo_fast.report.runs import Run, set_name
from amopo_fast.report.sheet import Panel, Row
from amopo_fast.report.style import look, told_apart

_METRICS = (("Accuracy", "accuracy", 100.0, ", %"), ("Margin", "margin", 1.0, ""))


def trade_off_row(runs: Sequence[Run], first: str, second: str) -> Row:
    """Each run's accuracy, and its margin, in two dimensions: a point a run, and the edge of what some run reaches in
    both.

    The last evaluation counts, of the first set that all runs have; without one, training, as it is smoothed.

    Raises:
        ValueError: fewer than two runs, twice the same dimension, or one that a run did not log.
    """
    if len(runs) < 2:
        raise ValueError("a trade-off is between runs: name at least two")
    if first == second:
        raise ValueError(f"trade_off names {first} twice: name two dimensions")
    for run in runs:
        for name in (first, second):
            if name not in run.dimensions:
                found = ", ".join(run.dimensions) or "none"
                raise ValueError(f"trade_off: {run.name} has no dimension {name}; it logged {found}")
    shared = [prefix for prefix in runs[0].eval_sets if all(prefix in run.eval_sets for run in runs)]
    prefix = shared[0] if shared else ""
    panels = []
    for title, metric, scale, unit in _METRICS:
        points = [
            (scale * _last(run, prefix, f"{metric}/{first}"), scale * _last(run, prefix, f"{metric}/{second}"))
            for run in runs
        ]
        panels.append(
            Panel(f"{title}, two dimensions", partial(_draw, runs, points, metric), f"{first}{unit}", f"{second}{unit}",
                  note="A point is a run. None is beyond the line, whose corners are the runs that no other surpasses.")
        )
    return Row(panels, "Trade-off", f"last {set_name(prefix)}" if prefix else "end of training")


def front(points: Sequence[tuple[float, float]]) -> Points:
    """The points that no other one reaches or surpasses in both values and surpasses in one, from left to right."""
    kept = [
        (x, y) for x, y in points if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]
    return sorted(set(kept))


def _last(run: Run, prefix: str, name: str) -> float:
    found = run.points(prefix + name) if prefix else run.smooth(name)
    if not found:
        raise ValueError(f"trade_off: {run.name} has no finite {prefix}{name}: leave the run out")
    return found[-1][1]


def _draw(runs: Sequence[Run], points: Sequence[tuple[float, float]], metric: str, axis) -> None:
    for index, (label, (x, y)) in enumerate(zip(told_apart([run.name for run in runs]), points, strict=True)):
        marks.point(axis, x, y, look(index))
        marks.key(axis, label, look(index), marker=True, line=False, fill="none")
    least, lowest, highest = (2.0, -1.5, 101.5) if metric == "accuracy" else (0.0, -math.inf, math.inf)
    marks.fit_x(axis, [x for x, _ in points], least=least, lowest=lowest, highest=highest)
    marks.fit_y(axis, [y for _, y in points], least=least, lowest=lowest, highest=highest)
    marks.front(axis, front(points))

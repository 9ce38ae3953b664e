"""What can stand on an axis: curves, evaluations, intervals, reference lines, and the range that shows them.

Every function draws on a matplotlib Axes and returns nothing; sheet.py adds title, labels, ticks and the legend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from amopo_fast.report.curves import Points, thinned
from amopo_fast.report.style import ALARM, CONTEXT, DIM, FILLS, GRID, INK, Look

Interval = Mapping[str, "float | None"]  # {"value", "low", "high"}, None where it is not known

# Of fewer samples no interval is shown: it would fill the axis, or promise more than it knows.
FEWEST_FOR_INTERVAL = 10

CHOSEN, REJECTED = Look(INK, "-", "o"), Look(INK, (0, (3, 1.5)), "s")

_MOST_MARKERS = 25
_MOST_CROSSES = 40


def key(axis, label: str, look: Look, *, marker: bool = False, line: bool = True, fill: Any = "full") -> None:
    """An entry of the legend, for marks that carry no label themselves."""
    axis.plot([], [], color=look.color, linestyle=look.dash if line else "none", fillstyle=fill,
              marker=look.marker if marker else None, label=label)  # fmt: skip


def curve(axis, points: Points, look: Look, *, raw: Points | None = None, thin: bool = False) -> None:
    """A training metric; `raw` is what it was before it was smoothed, shown faint behind; `thin` leaves room for many
    lines."""
    if raw:
        axis.plot(*_xy(thinned(raw)), color=look.color, linewidth=0.7, alpha=0.3, zorder=1.8)
    if len(points) == 1:
        axis.plot(*_xy(points), color=look.color, marker="_", markersize=13, markeredgewidth=1.8)
    elif points:
        width, alpha = (1.2, 0.75) if thin else (1.6, 1.0)
        axis.plot(*_xy(thinned(points)), color=look.color, linestyle=look.dash, linewidth=width, alpha=alpha)


def evaluations(axis, points: Points, look: Look, number: int = 0) -> None:
    """An evaluation metric: markers on a thin line. `number` counts the evaluation sets, told apart by their fill."""
    if points:
        shown = thinned(points)
        axis.plot(*_xy(shown), color=look.color, linestyle=look.dash, linewidth=0.8, marker=look.marker,
                  markevery=-(-len(shown) // _MOST_MARKERS), fillstyle=FILLS[number % len(FILLS)],
                  markeredgewidth=0.9, zorder=2.4)  # fmt: skip


def background(axis, points: Points) -> None:
    """Another run's line, for comparison."""
    if points:
        axis.plot(*_xy(thinned(points)), color=CONTEXT, linewidth=0.8, alpha=0.55, zorder=1.5)


def point(axis, x: float, y: float, look: Look) -> None:
    """One of several things, placed by two values; hollow, so that two at one place are both seen."""
    axis.plot([x], [y], linestyle="none", marker=look.marker, color=look.color, fillstyle="none", markersize=7,
              markeredgewidth=1.6)  # fmt: skip


def front(axis, points: Points) -> None:
    """The edge of what points reach or surpass in both values, as steps from the axis' left edge to its lower one; the
    points rise in x and fall in y, and the axis has its ranges."""
    left, low = axis.get_xlim()[0], axis.get_ylim()[0]
    xs = [left, *(x for x, _ in points for _ in "xx")]
    ys = [*(y for _, y in points for _ in "yy"), low]
    axis.plot(xs, ys, color=CONTEXT, linewidth=1.0, zorder=1.6, scalex=False, scaley=False)


def intervals(
    axis, xs: Sequence[float], values: Sequence[Interval], look: Look, *, scale: float = 1.0, joined: bool = False,
    upright: bool = True,
) -> None:  # fmt: skip
    """Values at `xs` as markers, each with its interval. `joined` puts a line through them; not `upright`, `xs` are
    places on the vertical axis.
    """
    turn = 1 if upright else -1
    for x, v in zip(xs, values, strict=True):
        if v["low"] is not None:
            ends = ([x, x], [scale * v["low"], scale * v["high"]])
            axis.plot(*ends[::turn], color=look.color, linewidth=1.3, alpha=0.65)
    found = [(x, scale * v["value"]) for x, v in zip(xs, values, strict=True) if v["value"] is not None]
    axis.plot(*_xy(found)[::turn], color=look.color, linewidth=1.1, linestyle=look.dash if joined else "none",
              marker=look.marker, zorder=2.4)  # fmt: skip


def bounds(values: Sequence[Interval], scale: float = 1.0) -> list[float]:
    """What an axis has to hold to show `intervals`."""
    return [scale * v[name] for v in values for name in ("value", "low", "high") if v[name] is not None]


def named_rows(axis, names: Sequence[str]) -> None:
    """The vertical axis as rows 0, 1, ... from the top, each with its name inside, above what stands in it."""
    axis.set_ylim(len(names) - 0.45, -0.75)
    axis.set_yticks([])
    for row, name in enumerate(names):
        axis.annotate(name, (0, row - 0.42), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", fontsize=7.5, color=DIM)  # fmt: skip
        if row:
            axis.axhline(row - 0.7, color=GRID, linewidth=0.6)


def outline(axis, edges: Sequence[float], shares: Sequence[float], look: Look, label: str) -> None:
    """A histogram as its outline."""
    axis.stairs(shares, edges, color=look.color, linestyle=look.dash, linewidth=1.4, label=label)


def reference(axis, y: float, text: str = "") -> None:
    """A horizontal line that values are read against, with words at its right end, outside of the axes."""
    axis.axhline(y, color=DIM, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.6)
    axis.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                  va="center", fontsize=7.5, color=DIM, annotation_clip=False)  # fmt: skip


def not_finite(axis, steps: Sequence[float], last: float) -> None:
    """Crosses at the upper edge, where a metric was NaN or infinite; `last` is the axis' last step."""
    shown: list[float] = []
    for step in sorted(steps):
        if not shown or step - shown[-1] >= last / _MOST_CROSSES:
            shown.append(step)
    if shown:
        axis.plot(shown, [0.96] * len(shown), transform=axis.get_xaxis_transform(), linestyle="none", marker="x",
                  color=ALARM, markersize=5, markeredgewidth=1.4, label="not a finite number")  # fmt: skip


def nothing(axis, text: str) -> None:
    """Words where there is nothing to draw."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=DIM)
    axis.set_yticks([])


def fit_y(
    axis, values: Sequence[float], *, least: float = 0.0, lowest: float = -math.inf, highest: float = math.inf,
    log: bool = False,
) -> None:  # fmt: skip
    """The range of `values` with a margin, at least `least` wide, not beyond `lowest` and `highest`.

    With `log`, an axis on which the largest is more than 30 times the median becomes logarithmic.
    """
    if not values:
        return
    if log and min(values) > 0 and max(values) > 30 * sorted(values)[len(values) // 2]:
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 1.3, max(values) * 1.3)
    else:
        axis.set_ylim(*_range(values, least, lowest, highest))


def fit_x(
    axis, values: Sequence[float], *, least: float = 0.0, lowest: float = -math.inf, highest: float = math.inf
) -> None:
    """As `fit_y`, for an axis of something else than steps."""
    if values:
        axis.set_xlim(*_range(values, least, lowest, highest))


def fit_steps(axis, last: float) -> None:
    """Steps from 0 to `last`, with room for a marker at the end."""
    axis.set_xlim(-0.015 * max(last, 1), 1.03 * max(last, 1))


def _range(values: Sequence[float], least: float, lowest: float, highest: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    least = max(least, 0.1 * largest if high - low <= 1e-9 * largest else 0.0)
    if largest < 1e-15:
        least = max(least, 1.0)
    grow = max(least - (high - low), 0.0) / 2
    margin = 0.06 * max(high - low, least)
    return max(low - grow - margin, lowest), min(high + grow + margin, highest)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]

"""Which charts a report shows, apart from how they are drawn: figure.py draws them with matplotlib, svg.py as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from amopo_fast.report.runs import Points, Run, smoothed


@dataclass(frozen=True)
class Series:
    """One line or row of dots. `color` counts into the palette. `band` is (x, low, high): an area around a line, a
    whisker at a dot."""

    name: str
    points: Points
    color: int
    kind: Literal["line", "faint", "dots"] = "line"
    dashed: bool = False
    band: list[tuple[float, float, float]] | None = None
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    title: str
    series: list[Series]
    x_label: str = "optimizer step"
    y_range: tuple[float | None, float | None] = (None, None)
    note: str = ""
    x_names: list[str] | None = None  # names of the x values 0, 1, ...


@dataclass(frozen=True)
class Section:
    title: str
    panels: list[Panel] = field(default_factory=list)


PER_DIMENSION = (
    ("margin", "Margin", "beta (l_chosen - l_rejected) - gamma; dots: held out", (None, None)),
    ("accuracy", "Accuracy", "pairs whose chosen response is likelier per token; dots: held out", (0.0, 1.0)),
    ("weight", "Weight", "share of the dimension in a pair's loss; dots: held out", (0.0, None)),
)


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Charts of one run, its dimensions in one chart each, or of several, a chart per dimension with a line per run."""
    names = list(dict.fromkeys(name for run in runs for name in run.dimensions))
    held_out = "line: training, smoothed; dots: held out" if any(run.eval_sets for run in runs) else ""
    overview = [
        _overlay(runs, "loss", "Loss", note=held_out),
        _overlay(runs, "accuracy/mean", "Accuracy, mean over dimensions", y_range=(0.0, 1.0), note=held_out),
        _overlay(runs, "margin/mean", "Margin, mean over dimensions", note=held_out),
    ]
    sections = [Section("Overview", overview)]
    if len(runs) == 1:
        panels = [_dimensions(runs[0], metric, names, title, y_range, note)
                  for metric, title, note, y_range in PER_DIMENSION]  # fmt: skip
        sections.append(Section("By dimension", panels))
    else:
        for metric, title, note, y_range in PER_DIMENSION:
            panels = [_overlay(runs, f"{metric}/{name}", f"{title}: {name}", y_range=y_range, note=note)
                      for name in names]  # fmt: skip
            sections.append(Section(f"{title} by dimension", panels))
    note = "line: mean; band: standard deviation, both averaged over pairs"
    for run in runs:
        panels = [_probabilities(run, name, note) for name in names]
        of = f" of {run.name}" if len(runs) > 1 else ""
        sections.append(Section(f"Probability of the response tokens{of}", panels))
    cost = [
        _overlay(runs, "tokens_per_second/computed", "Computed tokens per second", y_range=(0.0, None)),
        _overlay(runs, "tokens_per_second/padded_equivalent", "Padded-equivalent tokens per second",
                 y_range=(0.0, None), note="what a batch padded to its longest sequence would have computed"),
        _overlay(runs, "memory/peak_gib", "Peak memory, GiB", y_range=(0.0, None), exact=True),
        _overlay(runs, "grad_norm", "Gradient norm"),
        _overlay(runs, "learning_rate", "Learning rate", y_range=(0.0, None), exact=True),
    ]  # fmt: skip
    sections.append(Section("Throughput, memory and the optimizer", cost))
    kept = [Section(s.title, [panel for panel in s.panels if panel.series]) for s in sections]
    return [section for section in kept if section.panels]


def _overlay(
    runs: Sequence[Run],
    key: str,
    title: str,
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    note: str = "",
    exact: bool = False,
) -> Panel:
    series = []
    for color, run in enumerate(runs):
        name = run.name if len(runs) > 1 else "training"
        series += _training(run.points(key), name, color, exact)
        for number, prefix in enumerate(run.eval_sets):
            label = "held out" if prefix == "eval_" else f"held out: {prefix[5:-1]}"
            # One run has the other colors to itself; of several runs each keeps its own.
            shade = color if len(runs) > 1 else number + 1
            series += _held_out(run.points(prefix + key), f"{run.name}, {label}" if len(runs) > 1 else label, shade,
                                legend=len(runs) == 1)  # fmt: skip
    return Panel(title, series, y_range=y_range, note=note)


def _dimensions(
    run: Run,
    metric: str,
    names: Sequence[str],
    title: str,
    y_range: tuple[float | None, float | None],
    note: str,
) -> Panel:
    series = []
    for color, name in enumerate(names):
        series += _training(run.points(f"{metric}/{name}"), name, color)
        for prefix in run.eval_sets:
            series += _held_out(run.points(f"{prefix}{metric}/{name}"), f"{name}, held out", color, legend=False)
    return Panel(title, series, y_range=y_range, note=note)


def _training(points: Points, name: str, color: int, exact: bool = False) -> list[Series]:
    if len(points) < 3:
        return [Series(name, points, color, "dots")] if points else []
    if exact:
        return [Series(name, points, color)]
    return [Series(name, points, color, "faint", legend=False), Series(name, smoothed(points), color)]


def _held_out(points: Points, name: str, color: int, legend: bool = True) -> list[Series]:
    return [Series(name, points, color, "dots", dashed=True, legend=legend)] if points else []


def _probabilities(run: Run, name: str, note: str) -> Panel:
    series = []
    for color, side in enumerate(("chosen", "rejected")):
        mean = smoothed(run.points(f"prob_mean_{side}/{name}"))
        spread = dict(smoothed(run.points(f"prob_std_{side}/{name}")))
        band = [(s, max(m - spread[s], 0.0), min(m + spread[s], 1.0)) for s, m in mean if s in spread]
        if mean:
            series.append(Series(side, mean, color, band=band))
    return Panel(name, series, y_range=(0.0, 1.0), note=note)

"""What the pictures of training runs show, by the questions that a person asks.

Is it learning: loss. Is it healthy: gradient norm, learning rate. What does it cost: tokens/s, memory. Then for each
run: in which dimensions (accuracy, margin), what the weighting does (weights around 1/K), and whether the chosen
responses stay likely. Eight kinds of panels, for one run and for many; trade_off.py has what several runs make of two
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from amopo_fast.report import marks
from amopo_fast.report.curves import FEWEST_SMOOTHED, Points
from amopo_fast.report.runs import Run, set_name
from amopo_fast.report.sheet import LOW_PANEL_HEIGHT, PANEL_HEIGHT, Panel, Row
from amopo_fast.report.style import DIM, FILLS, Look, look, number, told_apart
from amopo_fast.report.trade_off import trade_off_row

_MOST_RAW = 3  # runs with their raw values behind their smoothed ones; more would hide each other
_MOST_THICK = 4  # dimensions, likewise
_MOST_HIGH = 3  # runs with high rows

NOTES = {
    "loss": "As trained: the weighted sum over dimensions, per pair.",
    "accuracy": "Pairs whose response with the higher score is likelier per token; ties do not count; dotted: chance.",
    "margin": "beta (l_chosen - l_rejected) - gamma, l the mean log-probability of a response's tokens.",
    "weight": "A dimension's mean share of a pair's loss; dotted: equal shares.",
    "probability": "Mean over a response's tokens, pairs and dimensions.",
    "gradient": "Global norm before clipping.",
}


def describe(runs: Sequence[Run]) -> tuple[str, str]:
    """Title and subtitle: what was run, how far it came, and where it stands."""
    if len(runs) == 1:
        return f"Training run {runs[0].name}", _standing(runs[0])
    if len(runs) == 2:
        title = "Training runs " + " and ".join(told_apart([run.name for run in runs]))
    else:
        title = f"{len(runs)} training runs"
    steps = sorted(run.last_step for run in runs)
    many = f"{steps[0]:,.0f} to {steps[-1]:,.0f}" if steps[0] < steps[-1] else f"{steps[0]:,.0f}"
    return title, f"{many} optimizer steps. The runs together, then a row for each"


def reading(runs: Sequence[Run]) -> str:
    """What kinds of lines and markers the pictures of these runs have."""
    if any(len(run.points("loss")) >= FEWEST_SMOOTHED for run in runs):
        raw = " (faint behind it: as logged)" if len(runs) <= _MOST_RAW else ""
        text = f"Lines: training, smoothed with a Gaussian window that has half its weight within 1/30 of the run{raw}."
    else:
        text = "Lines: training, as logged."
    sets = max((len(run.eval_sets) for run in runs), default=0)
    if sets:
        text += " Markers on thin lines: evaluation" + (", the sets by their filling." if sets > 1 else ".")
    return text + (" Grey lines: the other runs in training, mean over dimensions." if len(runs) > 1 else "")


def definitions() -> str:
    """What the dimensions' panels show, for a sheet, which has no room for notes beside them."""
    names = ("accuracy", "margin", "weight", "probability")
    return " ".join(f"{name.capitalize()}: {NOTES[name][0].lower()}{NOTES[name][1:]}" for name in names)


def run_rows(runs: Sequence[Run], trade_off: Sequence[str] = ()) -> list[Row]:
    """A row of the runs together, with two dimensions in `trade_off` one of the runs by these, and a row of dimensions
    for each.

    Raises ValueError if there is no metric to draw, and as `trade_off_row`.
    """
    if not any(run.points(key) for run in runs for key in run.keys):
        raise ValueError(f"{runs[0].name}: metrics.jsonl has no metric that could be drawn; train a logging step")
    drawn = _Drawn(runs)
    cost = drawn.speed_and_memory() if len(runs) > 1 else drawn.speed()
    rows = [
        Row(
            [
                Panel("Loss", drawn.loss, y_label="loss", note=NOTES["loss"]),
                Panel("Gradient norm", drawn.gradient_norm, y_label="gradient norm", note=NOTES["gradient"]),
                Panel("Learning rate", drawn.learning_rate, y_label="learning rate"),
                cost,
            ]
        )
    ]
    if trade_off:
        rows.append(trade_off_row(runs, *trade_off))
    before: list[str] | None = None
    height = PANEL_HEIGHT if len(runs) <= _MOST_HIGH else LOW_PANEL_HEIGHT
    for run in runs:
        panels = [
            Panel(title, partial(draw, run=run), y_label=y_label, note=NOTES[note], height=height)
            for title, draw, y_label, note in (
                ("Accuracy", drawn.accuracy, "accuracy, %", "accuracy"),
                ("Margin", drawn.margin, "margin", "margin"),
                ("Weights", drawn.weights, "weight", "weight"),
                ("Chosen and rejected responses", drawn.probability, "token probability", "probability"),
            )
        ]
        title, detail = (run.name, _standing(run)) if len(runs) > 1 else ("", "")
        rows.append(Row(panels, title, detail, continues=before == run.dimensions))
        before = run.dimensions
    return rows


def _standing(run: Run) -> str:
    parts = [f"{run.last_step:,.0f} optimizer step{'s' * (run.last_step != 1)}"]
    if run.lines[-1].get("epoch"):
        parts.append(f"epoch {number(run.lines[-1]['epoch'])}")
    for prefix in run.eval_sets:
        accuracy, loss = run.points(f"{prefix}accuracy/mean"), run.points(f"{prefix}loss")
        values = [f"accuracy {100 * y:.1f} %" for _, y in accuracy[-1:]] + [f"loss {y:.3g}" for _, y in loss[-1:]]
        if values:
            parts.append(f"last {set_name(prefix)}: {', '.join(values)}")
    return " · ".join(parts)


@dataclass(frozen=True)
class _Drawn:
    """The runs of one picture: which line is whose, and ranges that the rows have in common."""

    runs: Sequence[Run]

    # ----- the runs together -----

    def loss(self, axis) -> None:
        values = self._lines(axis, "loss")
        one = len(self.runs) == 1
        for index, run in enumerate(self.runs):
            for which, prefix in enumerate(run.eval_sets):
                shown, points = look(1 + which if one else index), run.points(f"{prefix}loss")
                marks.evaluations(axis, points, shown, which)
                values += [y for _, y in points]
                marks.key(axis, set_name(prefix), shown if one else Look(DIM, "-", "o"), marker=True, line=one,
                          fill=FILLS[which % len(FILLS)])  # fmt: skip
        self._ranges(axis, "loss", values, log=True)

    def gradient_norm(self, axis) -> None:
        self._ranges(axis, "grad_norm", self._lines(axis, "grad_norm"), log=True)

    def learning_rate(self, axis) -> None:
        self._ranges(axis, "learning_rate", self._lines(axis, "learning_rate", smooth=False), lowest=0.0)

    def speed(self) -> Panel:
        def draw(axis) -> None:
            values = self._lines(axis, "tokens_per_second/computed")
            self._ranges(axis, "tokens_per_second/computed", [0.0, *values] if values else [], lowest=0.0)

        memory = [y for _, y in self.runs[0].points("memory/peak_gib")]
        title = "Speed" + (f"; peak memory {max(memory):.3g} GiB" if memory else "")
        return Panel(title, draw, y_label="computed tokens/s", note="Tokens that the model computed, per second.")

    def speed_and_memory(self) -> Panel:
        def draw(axis) -> None:
            rates, sizes = [], []
            for index, (run, label) in enumerate(zip(self.runs, self._labels, strict=True)):
                rate = [y for _, y in run.points("tokens_per_second/computed")]
                size = [y for _, y in run.points("memory/peak_gib")]
                if rate and size:
                    marks.point(axis, max(size), median(rate), look(index))
                    marks.key(axis, label, look(index), marker=True, line=False, fill="none")
                    rates.append(median(rate))
                    sizes.append(max(size))
            if not rates:
                marks.nothing(axis, "not logged")
                return
            marks.fit_y(axis, rates, least=0.3 * max(rates), lowest=0.0)
            marks.fit_x(axis, sizes, least=0.3 * max(sizes), lowest=0.0)

        return Panel("Speed and memory", draw, x_label="peak memory, GiB", y_label="computed tokens/s",
                     note="Median of the logged tokens per second.")  # fmt: skip

    def _lines(self, axis, name: str, *, smooth: bool = True) -> list[float]:
        """A line for every run; the values that the axis has to hold."""
        values: list[float] = []
        for index, (run, label) in enumerate(zip(self.runs, self._labels, strict=True)):
            if len(self.runs) > 1 or name == "loss":
                marks.key(axis, label, look(index), marker=len(self.runs) > 1)
            points, line = run.points(name), run.smooth(name) if smooth else run.points(name)
            raw = smooth and len(self.runs) <= _MOST_RAW and len(points) >= FEWEST_SMOOTHED
            marks.curve(axis, line, look(index), raw=points if raw else None)
            values += [y for _, y in (points if raw else line)]
        return values

    def _ranges(self, axis, name: str, values: Sequence[float], *, log: bool = False, lowest: float = -math.inf):
        bad = [step for run in self.runs for step in run.not_finite(name)]
        marks.not_finite(axis, bad, self._last)
        if values:
            marks.fit_y(axis, values, log=log, lowest=lowest)
        else:
            marks.nothing(axis, "no finite value" if bad else "not logged")
        self._steps(axis)

    # ----- a row of one run -----

    def accuracy(self, axis, run: Run) -> None:
        self._others(axis, run, "accuracy/mean", 100)
        marks.reference(axis, 50, "50 %")
        self._dimensions(axis, run, "accuracy", 100)
        marks.fit_y(axis, [50.0, *self._values("accuracy", 100)], lowest=-1.5, highest=101.5)
        self._steps(axis)

    def margin(self, axis, run: Run) -> None:
        self._others(axis, run, "margin/mean")
        marks.reference(axis, 0)
        self._dimensions(axis, run, "margin")
        marks.fit_y(axis, [0.0, *self._values("margin")])
        self._steps(axis)

    def weights(self, axis, run: Run) -> None:
        self._steps(axis)
        count = len(run.dimensions)
        if count < 2:
            marks.nothing(axis, "one dimension: its weight is 1" if count else "not logged")
            return
        marks.reference(axis, 1 / count, "1/K")
        self._dimensions(axis, run, "weight")
        found = self._values("weight", of=[each for each in self.runs if len(each.dimensions) == count])
        half = 1.1 * max([abs(y - 1 / count) for y in found], default=0.0)
        if half:
            axis.set_ylim(max(1 / count - half, 0), 1 / count + half)

    def probability(self, axis, run: Run) -> None:
        for side, shown in (("chosen", marks.CHOSEN), ("rejected", marks.REJECTED)):
            name = f"prob_mean_{side}/mean"
            marks.key(axis, side, shown, marker=bool(run.eval_sets))
            marks.curve(axis, run.smooth(name), shown)
            for which, prefix in enumerate(run.eval_sets):
                marks.evaluations(axis, run.points(prefix + name), shown, which)
        values = [y for side in ("chosen", "rejected") for y in self._values(f"prob_mean_{side}", names=["mean"])]
        if not values:
            marks.nothing(axis, "not logged")
        marks.fit_y(axis, values, lowest=0.0)
        self._steps(axis)

    def _dimensions(self, axis, run: Run, metric: str, scale: float = 1.0) -> None:
        names = self._names
        if not run.dimensions:
            marks.nothing(axis, "not logged")
        for name in run.dimensions:
            shown = look(names.index(name))
            marks.key(axis, name, shown, marker=bool(run.eval_sets))
            points = _scaled(run.smooth(f"{metric}/{name}"), scale)
            marks.curve(axis, points, shown, thin=len(run.dimensions) > _MOST_THICK)
            for which, prefix in enumerate(run.eval_sets):
                marks.evaluations(axis, _scaled(run.points(f"{prefix}{metric}/{name}"), scale), shown, which)

    def _others(self, axis, run: Run, name: str, scale: float = 1.0) -> None:
        for other in self.runs:
            if other is not run:
                marks.background(axis, _scaled(other.smooth(name), scale))

    def _values(
        self, metric: str, scale: float = 1.0, *, of: Sequence[Run] | None = None, names: Sequence[str] | None = None
    ) -> list[float]:
        """The lowest and the highest of every line of all runs, so that their rows have the same range."""
        found = []
        for run in self.runs if of is None else of:
            for name in names or run.dimensions:
                series = [run.smooth(f"{metric}/{name}")]
                series += [run.points(f"{prefix}{metric}/{name}") for prefix in run.eval_sets]
                for points in filter(None, series):
                    found += [scale * min(y for _, y in points), scale * max(y for _, y in points)]
        return found

    def _steps(self, axis) -> None:
        marks.fit_steps(axis, self._last)

    @property
    def _last(self) -> float:
        return max(run.last_step for run in self.runs)

    @property
    def _labels(self) -> list[str]:
        return told_apart([run.name for run in self.runs]) if len(self.runs) > 1 else ["training"]

    @property
    def _names(self) -> list[str]:
        """Dimensions of all runs: one has the same colour in every row."""
        return list(dict.fromkeys(name for run in self.runs for name in run.dimensions))


def _scaled(points: Points, scale: float) -> Points:
    return points if scale == 1 else [(x, scale * y) for x, y in points]

"""What models prefer: the pictures of evaluations, and a page of them with the numbers as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

from amopo_fast.report import marks
from amopo_fast.report.marks import FEWEST_FOR_INTERVAL
from amopo_fast.report.page import page, pictures, table
from amopo_fast.report.sheet import PANEL_HEIGHT, STEPS, Panel, Row
from amopo_fast.report.style import DIM, look, told_apart

Evaluations = dict[str, dict[str, Any]]

_MOST_MODELS = 8  # in one panel
_METRICS = (("Accuracy", "accuracy", "accuracy, %", 100.0), ("Margin", "margin", "margin", 1.0))


def evaluation_page(title: str, evaluations: Evaluations) -> str:
    """HTML of the evaluations of one set: summaries (`evaluate.summary`) by model, in order.

    A summary may hold "step", its checkpoint's optimizer step, and "difference", to the first model.
    """
    names = list(next(iter(evaluations.values()))["dimensions"])
    first, last = next(iter(evaluations)), list(evaluations)[-1]
    columns = ["model", "mean", *names]
    body = "<h2>Accuracy</h2>" + table(columns, _table(evaluations, names, "accuracy", _percent))
    changed = {model: e for model, e in evaluations.items() if "difference" in e}
    if changed:
        rows = [
            [model, *(_signed(e["difference"][name]) for name in ("mean", *names))]
            for model, e in changed.items()
        ]
        body += f"<h2>Change in accuracy since {escape(first)}, pair by pair</h2>" + table(columns, rows)
    body += "<h2>Chosen response preferred</h2>"
    body += table(columns, _table(evaluations, names, "preference_accuracy", _percent))
    body += "<h2>Margin</h2>" + table(columns, _table(evaluations, names, "margin", _value))
    body += pictures(evaluation_rows(evaluations))
    agreement = evaluations[last]["agreement"]
    rows = [
        [name, *(_agreed(share, r) for share, r in zip(shares, correlations, strict=True))]
        for name, shares, correlations in zip(
            names, agreement["same_side"], agreement["margin_correlation"], strict=True
        )
    ]
    body += f"<h2>Pairs in which two dimensions prefer the same side, and correlation of margins: {escape(last)}</h2>"
    body += table(["", *names], rows)
    body += f"<h2>Scores of the dimensions: {escape(last)}</h2>"
    columns = ["", "pairs", "tied", "rejected scores higher", "rank correlation of margin and score gap",
               "calibration error"]  # fmt: skip
    body += table(columns, _scores_table(evaluations[last], names))
    if "asked" in evaluations[last]:
        body += "<h2>Responses under each asked level, log-prob per token</h2>" + _asked(evaluations)
    lead = (
        f"{evaluations[last]['pairs']} pairs of {evaluations[last]['prompts']} prompts. Accuracy: the response with "
        "the higher score in the dimension is likelier per token than the other one; ties do not count. Intervals are "
        f"95 %, draw prompts again, and are left out below {FEWEST_FOR_INTERVAL} pairs."
    )
    return page(title, lead, body)


# ----- pictures -----


def evaluation_rows(evaluations: Evaluations) -> list[Row]:
    """Over training, where several checkpoints of a run were evaluated, and models beside each other; then what the
    last model does with length, weights and tokens."""
    names = list(next(iter(evaluations.values()))["dimensions"])
    panels = []
    trained = {model: e for model, e in evaluations.items() if e.get("step") is not None}
    if len({e["step"] for e in trained.values()}) > 1:
        for title, metric, y_label, scale in _METRICS:
            draw = partial(_over_training, trained, names, metric, scale)
            panels.append(Panel(f"{title} over training", draw, STEPS, y_label))
        by_step = sorted(trained, key=lambda model: trained[model]["step"])
        models = [model for model in evaluations if model not in by_step[1:-1]]
    else:
        models = list(evaluations)
    if len(models) > _MOST_MODELS:
        models = [models[0], *models[1 - _MOST_MODELS :]]
    shown = {model: evaluations[model] for model in models}
    height = _height(len(names) + 1, len(shown))
    note = f"{len(shown)} of {len(evaluations)} models." if len(shown) < len(evaluations) else ""
    panels += [Panel(title, partial(_by_dimension, shown, names, metric, scale), y_label, note=note, height=height)
               for title, metric, y_label, scale in _METRICS]  # fmt: skip
    rows = [Row(panels, "By dimension")]

    last = models[-1]
    final = evaluations[last]
    ends = {model: evaluations[model] for model in dict.fromkeys((models[0], last))}
    panels = [
        Panel("Accuracy by length", partial(_by_length, ends), "accuracy, %",
              note="Mean over dimensions, by how many tokens the chosen response is longer.",
              height=_height(len(final["by_length"]), len(ends))),
        Panel("Weights", partial(_weights, final, names), "weight of the dimension in a pair's loss", "% of pairs",
              note="Dotted: equal weights."),
        Panel("Token probabilities", partial(_token_probabilities, final, names), "probability of a response token",
              "% of tokens", note="Of all dimensions together."),
    ]  # fmt: skip
    rows.append(Row(panels, f"Length, weights, tokens: {last}"))
    return rows


def _height(rows: int, models: int) -> float:
    return max(rows * (0.22 + 0.09 * models), PANEL_HEIGHT)


def _over_training(evaluations: Evaluations, names: Sequence[str], metric: str, scale: float, axis) -> None:
    ordered = sorted(evaluations.values(), key=lambda e: e["step"])
    last = ordered[-1]["step"]
    values: list[float] = []
    for index, name in enumerate(names):
        found = [e["dimensions"][name][metric] for e in ordered]
        # Intervals at one step stand beside each other.
        shift = 0.008 * last * (index - (len(names) - 1) / 2)
        marks.key(axis, name, look(index), marker=True)
        marks.intervals(axis, [e["step"] + shift for e in ordered], found, look(index), scale=scale,
                        joined=True)  # fmt: skip
        values += marks.bounds(found, scale)
    _reference(axis, metric)
    _fit(axis, metric, values)
    marks.fit_steps(axis, last)


def _by_dimension(evaluations: Evaluations, names: Sequence[str], metric: str, scale: float, axis) -> None:
    rows = ["mean", *names]
    values: list[float] = []
    for index, (label, e) in enumerate(zip(told_apart(list(evaluations)), evaluations.values(), strict=True)):
        found = [e["mean"][metric], *(e["dimensions"][name][metric] for name in names)]
        marks.intervals(axis, _places(len(rows), index, len(evaluations)), found, look(index), scale=scale,
                        upright=False)  # fmt: skip
        marks.key(axis, label, look(index), marker=True, line=False)
        values += marks.bounds(found, scale)
    marks.named_rows(axis, rows)
    limits = {"lowest": -1.5, "highest": 101.5} if metric == "accuracy" else {}
    marks.fit_x(axis, values, least=0.02 * scale, **limits)


def _by_length(evaluations: Evaluations, axis) -> None:
    values: list[float] = []
    groups: list[dict[str, Any]] = []
    for index, (label, e) in enumerate(zip(told_apart(list(evaluations)), evaluations.values(), strict=True)):
        groups = e["by_length"]
        found = [group["accuracy"] for group in groups]
        marks.intervals(axis, _places(len(groups), index, len(evaluations)), found, look(index), scale=100,
                        upright=False)  # fmt: skip
        marks.key(axis, label, look(index), marker=True, line=False)
        values += marks.bounds(found, 100)
    marks.named_rows(axis, [f"{_range(group['from'], group['to'])} tokens: {group['pairs']} pairs" for group in groups])
    marks.fit_x(axis, values, least=2, lowest=-1.5, highest=101.5)


def _places(rows: int, index: int, count: int) -> list[float]:
    """Where one of `count` models stands in each of `marks.named_rows`."""
    return [row + 0.55 * ((index + 0.5) / count - 0.5) for row in range(rows)]


def _range(low: int, high: int) -> str:
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"


def _weights(e: dict[str, Any], names: Sequence[str], axis) -> None:
    if len(names) == 1:
        marks.nothing(axis, "one dimension: its weight is 1")
        return
    highest = 0.0
    for index, name in enumerate(names):
        found = e["dimensions"][name]["weight"]
        shares = _shares(found["counts"])
        marks.outline(axis, found["edges"], shares, look(index), name)
        highest = max(highest, *shares)
    axis.axvline(1 / len(names), color=DIM, linewidth=0.9, linestyle=(0, (1, 2)))
    edges = e["dimensions"][names[0]]["weight"]["edges"]
    axis.set_xlim(min(edges[0], 1 / len(names)), max(edges[-1], 1 / len(names)))
    axis.set_ylim(0, 1.06 * highest or 1)


def _token_probabilities(e: dict[str, Any], names: Sequence[str], axis) -> None:
    axis.set_yscale("log")
    axis.set_xlim(0, 1)
    least = 100.0
    for side, shown in (("chosen", marks.CHOSEN), ("rejected", marks.REJECTED)):
        counts = [sum(column) for column in zip(*(e["probabilities"][name][side] for name in names), strict=True)]
        shares = _shares(counts)
        marks.outline(axis, e["probabilities"]["edges"], shares, shown, side)
        least = min([least, *(share for share in shares if share)])
    axis.set_ylim(least / 1.5, 130)


def _shares(counts: Sequence[int]) -> list[float]:
    return [100 * count / (sum(counts) or 1) for count in counts]


def _reference(axis, metric: str) -> None:
    if metric == "accuracy":
        marks.reference(axis, 50, "50 %")
    else:
        marks.reference(axis, 0)


def _fit(axis, metric: str, values: Sequence[float]) -> None:
    if metric == "accuracy":
        marks.fit_y(axis, [50.0, *values], lowest=-1.5, highest=101.5)
    else:
        marks.fit_y(axis, [0.0, *values])


# ----- tables -----


def _table(evaluations: Evaluations, names: Sequence[str], metric: str, cell: Callable) -> list[list[str]]:
    return [
        [model, *(cell(part[metric]) for part in (e["mean"], *(e["dimensions"][name] for name in names)))]
        for model, e in evaluations.items()
    ]


def _scores_table(e: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    """What the scores of the dimensions say, and how well the margins and the probabilities follow them."""
    rows = []
    for name in names:
        found = e["dimensions"][name]
        calibration = found["calibration"]
        rows.append(
            [
                name, str(found["pairs"]), str(found["tied"]), str(found["reversed"]),
                _value(found["rank_correlation"]),
                "absent" if calibration is None else f"{100 * calibration['error']:.1f} %",
            ]  # fmt: skip
        )
    return rows


def _asked(evaluations: Evaluations) -> str:
    levels = [f"{level:g}" for level in list(evaluations.values())[-1]["asked"]["levels"]]
    columns = ["", *(f"{side}, {level}" for side in ("chosen", "rejected") for level in levels),
               "change of the difference", "rank correlation with the score gap"]  # fmt: skip
    rows = [
        [f"{model}: {name}", *map(_value, part["logp_chosen"]), *map(_value, part["logp_rejected"]),
         _value(part["change"]), _value(part["rank_correlation"])]
        for model, e in evaluations.items()
        for name, part in e["asked"]["dimensions"].items()
    ]  # fmt: skip
    return table(columns, rows)


def _cell(value: marks.Interval, text: str, bound: str, scale: float = 1.0) -> str:
    """`text` and `bound` are formats."""
    if value["value"] is None:
        return "absent"
    shown = text.format(scale * value["value"])
    low, high = value["low"], value["high"]
    known = low is not None and high is not None
    return f"{shown}|{bound.format(scale * low)} to {bound.format(scale * high)}" if known else shown


def _percent(value: marks.Interval) -> str:
    return _cell(value, "{:.1f} %", "{:.1f}", 100)


def _signed(value: marks.Interval) -> str:
    return _cell(value, "{:+.1f}", "{:+.1f}", 100)


def _value(value: marks.Interval) -> str:
    return _cell(value, "{:.3f}", "{:.3f}")


def _agreed(share: float | None, correlation: float | None) -> str:
    if share is None:
        return "absent"
    return f"{100 * share:.1f} %" + ("" if correlation is None else f"|r {correlation:.2f}")

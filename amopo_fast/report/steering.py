"""Whether asking changes the answer: asked level against received score, and what else changed with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

from amopo_fast.report import marks
from amopo_fast.report.marks import FEWEST_FOR_INTERVAL
from amopo_fast.report.page import page, pictures, table
from amopo_fast.report.sheet import PANEL_HEIGHT, Panel, Row
from amopo_fast.report.style import CONTEXT, DIM, look, number, told_apart

Summary = dict[str, Any]  # of evaluation.steer_summary

_ASKED = "asked level"


def steering_rows(summary: Summary) -> list[Row]:
    """For each asked dimension: the score received at each level, the change in every judged dimension, win rates over
    the first model, and the length of the answers; what was not judged is left out."""
    judged, dimensions = summary["judged"], summary["dimensions"]
    rows = []
    own = [name for name in dimensions if name in judged]
    if own:
        panels = [
            Panel(f"Asked for {_words(name)}", partial(_received, summary, name), _ASKED, f"{_words(name)}, received",
                  note="Mean score of the answers by the level that was asked for. Dotted: as asked.")
            for name in own
        ]  # fmt: skip
        rows.append(Row(panels, "Asked level and received score"))
    if judged and len(summary["levels"]) > 1:
        height = max(len(judged) * (0.22 + 0.09 * len(summary["models"])), PANEL_HEIGHT)
        panels = [
            Panel(f"Asked for {_words(name)}", partial(_changed, summary, name), "change of the score",
                  note="From the lowest to the highest asked level, prompt by prompt.", height=height)
            for name in dimensions
        ]  # fmt: skip
        rows.append(Row(panels, "Asked for one, changed the others"))
    if summary["win_rates"]:
        first = next(iter(summary["models"]))
        how = "two verdicts, positions swapped" if summary["win_rates_by"] == "verdicts" else "the higher score wins"
        panels = [
            Panel(f"Asked for {_words(name)}", partial(_wins, summary, name), _ASKED, "won, %",
                  note=f"Over {first} in {_words(name)}; {how}; ties count half.")
            for name in dimensions
        ]  # fmt: skip
        rows.append(Row(panels, f"Wins over {first}"))
    panels = [
        Panel(f"Asked for {_words(name)}", partial(_length, summary, name), _ASKED, "words of an answer",
              note="A score that only follows the length is one that length can buy.")
        for name in dimensions
    ]  # fmt: skip
    rows.append(Row(panels, "Length of the answers"))
    return rows


def steering_page(summary: Summary, judge: str) -> str:
    """HTML of a steering experiment. judge: in a few words, "" for none."""
    body = ""
    judged, levels = summary["judged"], [f"{level:g}" for level in summary["levels"]]
    if judged:
        body += "<h2>Score received at each asked level</h2>"
        rows = [
            [f"{model}: {_words(name)}", *map(_value, part["judged"][name]["by_level"]),
             _signed(part["judged"][name]["change"]), _value(part["judged"][name]["rank_correlation"])]
            for model, parts in summary["models"].items()
            for name, part in parts.items()
            if name in judged
        ]  # fmt: skip
        columns = ["", *(f"asked {level}" for level in levels), "change", "rank correlation"]
        body += table(columns, rows)
        for model, parts in summary["models"].items():
            body += f"<h2>Asked for a row's dimension, changed a column's: {escape(model)}</h2>"
            columns = ["", *map(_words, judged)]
            body += table(columns, [[_words(name), *(_signed(part["judged"][j]["change"]) for j in judged)]
                                    for name, part in parts.items()])  # fmt: skip
        first = next(iter(summary["models"]))
        for model, parts in summary["difference"].items():
            if any(parts.values()):
                body += f"<h2>The same, {escape(model)} minus {escape(first)}</h2>"
                body += table(["", *map(_words, judged)], [[_words(name), *(_signed(part[j]) for j in judged)]
                                                           for name, part in parts.items()])  # fmt: skip
    body += pictures(steering_rows(summary))
    by = f"Scores of {judge} from {summary['score_range'][0]:g} to {summary['score_range'][1]:g}. " if judge else ""
    lead = (
        f"{summary['prompts']} prompts, each answered at the levels {', '.join(levels)}. {by}Intervals are 95 %, draw "
        f"prompts again, and are left out below {FEWEST_FOR_INTERVAL} prompts."
    )
    return page("Steering", lead, body)


# ----- panels -----


def _received(summary: Summary, name: str, axis) -> None:
    found = _by_model(summary, lambda parts: parts[name]["judged"][name]["by_level"])
    values = _lines(summary, found, axis)
    low, high = summary["score_range"]
    levels = summary["levels"]
    ends = [levels[0], levels[-1]]
    if values and min(values) >= low and max(values) <= high:  # the judge's scale is the asked one
        axis.plot(ends, ends, color=DIM, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.6)
        values += ends
    marks.fit_y(axis, values, least=0.1 * (high - low))


def _length(summary: Summary, name: str, axis) -> None:
    values = _lines(summary, _by_model(summary, lambda parts: parts[name]["words"]), axis)
    marks.fit_y(axis, [0.0, *values], lowest=0.0)


def _wins(summary: Summary, name: str, axis) -> None:
    found = {model: parts[name] for model, parts in summary["win_rates"].items()}
    _lines(summary, found, axis, 100)
    marks.reference(axis, 50, "50 %")
    marks.fit_y(axis, [0.0, 100.0])


def _lines(summary: Summary, found: dict[str, list[marks.Interval]], axis, scale: float = 1.0) -> list[float]:
    """A line a model over the levels; what the vertical axis has to hold."""
    levels, models = summary["levels"], list(summary["models"])
    names = told_apart(models)
    values: list[float] = []
    span = levels[-1] - levels[0] or 1.0
    for model, intervals in found.items():
        index = models.index(model)
        shift = 0.012 * span * (index - (len(models) - 1) / 2)  # intervals at one level stand beside each other
        marks.key(axis, names[index], look(index), marker=True)
        marks.intervals(axis, [level + shift for level in levels], intervals, look(index), scale=scale, joined=True)
        values += marks.bounds(intervals, scale)
    marks.fit_x(axis, levels, least=1.0)
    axis.set_xticks(levels, [number(level) for level in levels])
    if not values:
        marks.nothing(axis, "no scores")
    return values


def _changed(summary: Summary, name: str, axis) -> None:
    judged, models = summary["judged"], list(summary["models"])
    values = [0.0]
    for index, (label, parts) in enumerate(zip(told_apart(models), summary["models"].values(), strict=True)):
        found = [parts[name]["judged"][j]["change"] for j in judged]
        places = [row + 0.55 * ((index + 0.5) / len(models) - 0.5) for row in range(len(judged))]
        marks.key(axis, label, look(index), marker=True)
        marks.intervals(axis, places, found, look(index), upright=False)
        values += marks.bounds(found)
    axis.axvline(0, color=CONTEXT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.6)
    marks.named_rows(axis, [_words(j) + (" (asked for)" if j == name else "") for j in judged])
    marks.fit_x(axis, values, least=0.02 * (summary["score_range"][1] - summary["score_range"][0]))


def _by_model(summary: Summary, get: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return {model: get(parts) for model, parts in summary["models"].items()}


def _words(name: str) -> str:
    return name.replace("_", " ")


# ----- cells -----


def _value(value: marks.Interval) -> str:
    return _cell(value, "{:.2f}")


def _signed(value: marks.Interval) -> str:
    return _cell(value, "{:+.2f}")


def _cell(value: marks.Interval, form: str) -> str:
    if value["value"] is None:
        return "absent"
    shown = form.format(value["value"])
    if value["low"] is None:
        return shown
    return f"{shown}|{form.format(value['low'])} to {form.format(value['high'])}"


def lines_of(summary: Summary) -> Sequence[Sequence[str]]:
    """A row a model and asked dimension for a terminal: name, dimension, score at each level, change."""
    rows = []
    for model, parts in summary["models"].items():
        for name, part in parts.items():
            found = part["judged"].get(name)
            cells = [x["value"] for x in (found["by_level"] if found else part["words"])]
            shown = ["absent" if x is None else f"{x:.2f}" for x in cells]
            change = _signed(found["change"]).replace("|", " (") if found else ""
            rows.append([model, name, *shown, change + ")" * ("(" in change)])
    return rows

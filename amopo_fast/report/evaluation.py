"""Evaluations as a page: a table of models, and charts of what each prefers."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from amopo_fast.report.page import charts, page, table
from amopo_fast.report.panels import Panel, Section, Series


def evaluation_page(title: str, evaluations: dict[str, dict[str, Any]]) -> str:
    """HTML of the evaluations of one set: summaries (`evaluate.summary`) by model, in order.

    A summary may hold "step", its checkpoint's optimizer step, and "difference", to the first model.
    """
    names = list(next(iter(evaluations.values()))["dimensions"])
    first = next(iter(evaluations))
    columns = ["model", "mean", *names]
    rows = [
        [model, _percent(e["mean"]["accuracy"]), *(_percent(e["dimensions"][name]["accuracy"]) for name in names)]
        for model, e in evaluations.items()
    ]
    body = "<h2>Accuracy</h2>" + table(columns, rows)
    changed = [
        [model, *(_signed(e["difference"][name]) for name in ("mean", *names))]
        for model, e in evaluations.items()
        if "difference" in e
    ]
    if changed:
        body += f"<h2>Change in accuracy since {escape(first)}, pair by pair</h2>" + table(columns, changed)
    rows = [
        [model, _value(e["mean"]["margin"]), *(_value(e["dimensions"][name]["margin"]) for name in names)]
        for model, e in evaluations.items()
    ]
    body += "<h2>Margin</h2>" + table(columns, rows)
    last, final = list(evaluations.items())[-1]
    body += charts(_sections(evaluations, names, last, final))
    agreement = final["agreement"]
    rows = [
        [name, *(_agreed(share, r) for share, r in zip(shares, correlations, strict=True))]
        for name, shares, correlations in zip(
            names, agreement["same_side"], agreement["margin_correlation"], strict=True
        )
    ]
    body += f"<h2>Pairs in which two dimensions prefer the same side, and correlation of margins: {escape(last)}</h2>"
    body += table(["", *names], rows)
    pairs = final["pairs"]
    lead = (
        f"{pairs} pairs. Accuracy: the chosen response is likelier per token than the rejected one. Intervals are 95 % "
        "and take pairs as independent."
    )
    return page(title, lead, body)


def _sections(evaluations: dict[str, dict[str, Any]], names: list[str], last: str, final: dict) -> list[Section]:
    sections = []
    steps = {model: e["step"] for model, e in evaluations.items() if e.get("step") is not None}
    if len(steps) > 1:
        panels = []
        for metric, y_range in (("accuracy", (0.0, 1.0)), ("margin", (None, None))):
            series = []
            for color, name in enumerate(names):
                found = [(steps[model], evaluations[model]["dimensions"][name][metric]) for model in steps]
                series.append(_whiskered(name, found, color, dashed=True))
            panels.append(Panel(metric.capitalize(), series, y_range=y_range))
        sections.append(Section("Over training", panels))
    groups = final["by_length"]
    by_length = Panel(
        "Mean accuracy by length",
        [_whiskered(last, [(index, group["accuracy"]) for index, group in enumerate(groups)], 0)],
        x_label="chosen minus rejected tokens",
        y_range=(0.0, 1.0),
        x_names=[f"{g['from']}" if g["from"] == g["to"] else f"{g['from']}..{g['to']}" for g in groups],
        note="; ".join(f"{group['pairs']}" for group in groups) + " pairs",
    )
    weights = []
    for color, name in enumerate(names):
        found = final["dimensions"][name]["weight"]
        total = sum(found["counts"]) or 1
        middle = [(a + b) / 2 for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
        weights.append(Series(name, [(x, n / total) for x, n in zip(middle, found["counts"], strict=True)], color))
    sections.append(
        Section(
            f"Length and weights: {last}",
            [by_length, Panel("Weights", weights, x_label="weight of the dimension", note="share of pairs")],
        )
    )
    panels = []
    edges = final["probabilities"]["edges"]
    middle = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    for name in names:
        series = []
        for color, side in enumerate(("chosen", "rejected")):
            counts = final["probabilities"][name][side]
            total = sum(counts) or 1
            points = [(x, n / total) for x, n in zip(middle, counts, strict=True)]
            series.append(Series(side, points, color, band=[(x, 0.0, y) for x, y in points]))
        panels.append(Panel(name, series, x_label="probability of a response token", note="share of tokens",
                            y_range=(0.0, None)))  # fmt: skip
    sections.append(Section(f"Token probabilities: {last}", panels))
    return sections


def _whiskered(name: str, found: list[tuple[float, dict[str, float]]], color: int, dashed: bool = False) -> Series:
    known = [(x, value) for x, value in found if not math.isnan(value["value"])]
    band = [(x, v["low"], v["high"]) for x, v in known if not math.isnan(v["low"])]
    return Series(name, [(x, v["value"]) for x, v in known], color, "dots", dashed, band)


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['value']:.1f} %|{100 * value['low']:.1f} to {100 * value['high']:.1f}"


def _signed(value: dict[str, float]) -> str:
    return f"{100 * value['value']:+.1f}|{100 * value['low']:+.1f} to {100 * value['high']:+.1f}"


def _value(value: dict[str, float]) -> str:
    return f"{value['value']:.3f}|{value['low']:.3f} to {value['high']:.3f}"


def _agreed(share: float, correlation: float) -> str:
    return f"{100 * share:.1f} %" + ("" if math.isnan(correlation) else f"|r {correlation:.2f}")

"""What real_model.py's rows say, with intervals: `python benchmarks/real_model_summary.py real_model.json` again.

The folds are taken together, so every pair counts once, judged by a model that never saw it. l is the mean log-prob of
a response's tokens. Intervals are 95 %, by a bootstrap over pairs, each of which has a prompt of its own: they say how
far the pairs carry, not the seeds, whose own means stand beside them. Methods are compared pair by pair.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amopo_fast.evaluation.intervals import Clusters
from amopo_fast.report import marks
from amopo_fast.report.figure import draw
from amopo_fast.report.sheet import Panel, Row
from amopo_fast.report.style import look

BEFORE, BASELINE = "before training", "SimPO"
Rows = list[dict[str, Any]]


def add(path: Path) -> None:
    """Put the summary at the end of the rows of a JSON file, and draw it beside the file."""
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if row["case"] != "summary"]
    found = summarise(rows)
    report["rows"] = [*rows, {"case": "summary", **found}]
    path.write_text(json.dumps(report, indent=1) + "\n")
    if found["status"] == "ok":
        print(plot(found, path.with_suffix(".png")))
        print(reading(found))


class Judged:
    """What one method's models say of the P pairs of some folds, in K dimensions."""

    def __init__(self, rows: Rows, column: str = "judged"):
        """rows: a method's, one a fold. column: of the prompts as they are, or "asked_low"."""
        pairs = [(record, each) for row in rows for record, each in row[column].items()]
        self.records = [record for record, _ in pairs]
        sums, lengths = (np.array([each[name] for _, each in pairs], dtype=float) for name in ("logps", "tokens"))
        self.l = sums / lengths[:, None]  # (P, K, 2) nats a token, chosen and rejected
        self.difference = self.l[..., 0] - self.l[..., 1]  # (P, K)
        self.reward = sums[..., 0] - sums[..., 1]  # of the sums, as DPO's reward is

    def of(self, records: list[str]) -> np.ndarray:
        """(len(records),) their places."""
        places = {record: place for place, record in enumerate(self.records)}
        return np.array([places[record] for record in records])


def right(difference: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(P, K): whether the response with the higher score is preferred; NaN for a tie. Where there are no scores (gaps
    NaN) it is the chosen one."""
    prefers = (difference > 0).astype(float)
    return np.where(gaps == 0, np.nan, np.where(gaps < 0, 1 - prefers, prefers))


def summarise(rows: Rows) -> dict[str, Any]:
    """{"status", "seeds", "pairs", "methods": numbers of each, "against ...": of each method, paired differences}, of
    the methods that were run and the folds that all of them have."""
    data = rows[0]
    by_method = {name: {row["seed"]: row for row in rows if row["case"] == name} for name in (BEFORE, *data["methods"])}
    found = {method: each for method, each in by_method.items() if each}
    seeds = sorted(set.intersection(*(set(each) for each in found.values())))
    if not seeds or len(found) < 2:
        return {"status": "not run: no fold is complete"}
    judged = {method: Judged([each[seed] for seed in seeds]) for method, each in found.items()}
    low = {method: Judged([each[seed] for seed in seeds], "asked_low") for method, each in found.items()}
    records = judged[BEFORE].records
    names = data["dimensions"]
    gaps = np.array([[np.nan, *data["score_gaps"][record]] for record in records])
    clusters = Clusters(np.arange(len(records)))
    before = judged[BEFORE]
    correct = {method: right(each.difference, gaps) for method, each in judged.items()}
    fold_of = np.array([seed for seed in seeds for _ in found[BEFORE][seed]["judged"]])
    result: dict[str, Any] = {
        "status": "ok", "seeds": len(seeds), "pairs": len(records), "methods": {},
        "untied": {name: int((gaps[:, k] != 0).sum()) for k, name in enumerate(names) if k},
    }  # fmt: skip
    for method, each in judged.items():
        accuracy = by_name(clusters.share, correct[method], names)
        own: dict[str, Any] = {
            "accuracy": accuracy,
            "worst_dimension": min((accuracy[name]["value"], name) for name in names)[1],
            "mean_accuracy_by_seed": [float(np.nanmean(over(correct[method])[fold_of == seed])) for seed in seeds],
            "difference": by_name(clusters.mean, each.difference, names),
            "logp_chosen": by_name(clusters.mean, each.l[..., 0], names),
            "rank_correlation": {
                name: clusters.rank_correlation(each.difference[:, k], gaps[:, k]) for k, name in enumerate(names) if k
            },
            "asked": asked(low[method], each, names),
        }
        if method != BEFORE:
            own["reward_accuracy"] = by_name(clusters.share, right(each.reward - before.reward, gaps), names)
            own |= {
                name: [found[method][seed][name] for seed in seeds]
                for name in ("steps", "computed_tokens", "learning_rate", "loss_first", "loss_last")
            }
        result["methods"][method] = own
    for baseline in (name for name in (BEFORE, BASELINE) if name in judged):
        result[f"against {baseline}"] = {
            method: {
                "accuracy": by_name(clusters.mean, correct[method] - correct[baseline], names),
                "difference": by_name(clusters.mean, each.difference - judged[baseline].difference, names),
            }
            for method, each in judged.items()
            if method not in (BEFORE, baseline)
        }
    return result


def over(values: np.ndarray) -> np.ndarray:
    """(P,) means over the dimensions that count in a pair; one always does, no_object."""
    return np.nanmean(values, axis=1)


def by_name(measure, values: np.ndarray, names: list[str]) -> dict[str, Any]:
    return {"mean": measure(over(values)), **{name: measure(values[:, k]) for k, name in enumerate(names)}}


def asked(low: Judged, high: Judged, names: list[str]) -> dict[str, Any]:
    """By dimension, how much more l_chosen - l_rejected (nats a token) is where the chosen response's score is asked
    for than where LOW_LEVEL is: above 0 for a model that is steered."""
    places = high.of(low.records)
    change = high.difference[places] - low.difference
    clusters = Clusters(np.arange(len(places)))
    return {"pairs": len(places)} | {name: clusters.mean(change[:, k]) for k, name in enumerate(names) if k}


# ----- picture and words -----


def plot(summary: dict[str, Any], path: Path) -> Path:
    """Accuracy by dimension, and what training did to l_chosen - l_rejected and to l_chosen."""
    methods = summary["methods"]
    before = methods[BEFORE]
    changes = {name: each["difference"] for name, each in summary[f"against {BEFORE}"].items()}
    height = 0.3 * len(before["accuracy"]) * 2
    panels = [
        Panel("Accuracy on held-out pairs",
              partial(_intervals, {m: e["accuracy"] for m, e in methods.items()}, 100, 50),
              "% of the pairs that do not tie", "", height=height),
        Panel("Margin gained", partial(_intervals, changes, 1, 0), "change of l_chosen - l_rejected, nats a token", "",
              height=height),
        Panel("Likelihood of the chosen response",
              partial(_intervals, {m: e["logp_chosen"] for m, e in methods.items()}, 1, None),
              "l_chosen, nats a token", "", height=height),
    ]  # fmt: skip
    foot = (
        f"{summary['pairs']} held-out pairs; seeds, each with a fold of its own: {summary['seeds']}. 95 % intervals "
        "over pairs. l: mean log-probability of a response's tokens."
    )
    return draw([Row(panels)], path, "AMoPO, SimPO and DPO on a real model", foot=foot)


def _intervals(found: dict[str, dict[str, dict[str, float]]], scale: float, even: float | None, axis) -> None:
    names = list(next(iter(found.values())))
    everyone = [BEFORE, *(method for method in found if method != BEFORE)]
    shown: list[float] = [] if even is None else [even]
    if even is not None:
        axis.axvline(even, color=look(6).color, linewidth=0.9, linestyle=(0, (1, 2)))
    for method, values in found.items():
        index = everyone.index(method)
        places = [row + 0.55 * ((index + 0.5) / len(everyone) - 0.5) for row in range(len(names))]
        marks.intervals(axis, places, [values[name] for name in names], look(index), scale=scale, upright=False)
        marks.key(axis, method, look(index), marker=True, line=False)
        shown += marks.bounds(list(values.values()), scale)
    marks.named_rows(axis, names)
    marks.fit_x(axis, shown)


def reading(summary: dict[str, Any]) -> str:
    """Which methods differ from which, in words that the intervals decide."""
    lines = []
    for baseline in (BEFORE, BASELINE):
        for method, found in summary.get(f"against {baseline}", {}).items():
            said = []
            for what, values in found.items():
                more = [name for name, value in values.items() if (value["low"] or 0) > 0]
                less = [name for name, value in values.items() if (value["high"] or 0) < 0]
                said += [f"{what} higher in {', '.join(more)}"] * bool(more)
                said += [f"{what} lower in {', '.join(less)}"] * bool(less)
                said += [f"{what} not told apart"] * (not more and not less)
            lines.append(f"{method} against {baseline}: {'; '.join(said)}")
    return "\n".join(lines)


if __name__ == "__main__":
    add(Path(sys.argv[1]))

"""The numbers of an evaluation, with 95 % intervals: Scores -> a dictionary that is ready for strict JSON.

Pairs of one prompt are not independent, so the bootstrap draws prompts (intervals.py). What is not known is None.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from amopo_fast.evaluation.intervals import Clusters, Interval
from amopo_fast.evaluation.preferences import PROBABILITY_BINS, Scores

WEIGHT_BINS = 25
LENGTH_GROUPS = 5
CALIBRATION_BINS = 5
PERCENTILES = (5, 25, 50, 75, 95)


def summary(scores: Scores) -> dict[str, Any]:
    """Numbers of an evaluation.

    Keys: pairs; prompts; mean (accuracy, preference_accuracy and margin, averaged over a pair's dimensions first);
    dimensions (each with pairs, tied, reversed, accuracy, preference_accuracy, margin, rank_correlation of margin and
    score difference, calibration, weight, logp and prob by side); by_length (preference accuracy by the difference of
    the responses' tokens); agreement (of the dimensions' signs, and correlation of their margins); probabilities (of
    response tokens).
    """
    clusters = Clusters(scores.prompts)
    preference, margin, weight = (scores.column(name) for name in ("preference_accuracy", "margin", "weight"))
    present = ~np.isnan(preference)
    per_pair = {name: _over_dimensions(scores.column(name)) for name in ("accuracy", "preference_accuracy", "margin")}
    result: dict[str, Any] = {
        "pairs": len(scores.records),
        "prompts": clusters.count,
        **dataclasses.asdict(scores.objective),
        "mean": {
            "accuracy": clusters.share(per_pair["accuracy"]),
            "preference_accuracy": clusters.share(per_pair["preference_accuracy"]),
            "margin": clusters.mean(per_pair["margin"]),
        },
        "dimensions": {},
        "by_length": _by_length(scores, per_pair["preference_accuracy"]),
        "agreement": _agreement(scores),
        "probabilities": {"edges": np.linspace(0, 1, PROBABILITY_BINS + 1).round(4).tolist()},
    }
    edges = np.linspace(math.floor(100 * np.nanmin(weight)) / 100, math.ceil(100 * np.nanmax(weight)) / 100 + 1e-9,
                        WEIGHT_BINS + 1)  # fmt: skip
    for k, name in enumerate(scores.dimensions):
        here = present[:, k]
        known, gaps = weight[here, k], scores.score_gaps[:, k]
        accuracy = scores.column("accuracy")[:, k]
        result["dimensions"][name] = {
            "pairs": int(here.sum()),
            "tied": int((gaps[here] == 0).sum()),
            "reversed": int((gaps[here] < 0).sum()),
            "accuracy": clusters.share(accuracy),
            "preference_accuracy": clusters.share(preference[:, k]),
            "margin": clusters.mean(margin[:, k]),
            "rank_correlation": clusters.rank_correlation(margin[:, k], gaps),
            "calibration": _calibration(scores, k),
            "weight": {
                "mean": float(known.mean()) if len(known) else None,
                "percentiles": {str(q): float(np.percentile(known, q)) for q in PERCENTILES} if len(known) else {},
                "edges": edges.round(4).tolist(),
                "counts": np.histogram(known, edges)[0].tolist(),
            },
            **{
                column: clusters.mean(scores.column(column)[:, k])["value"]
                for column in ("logp_chosen", "logp_rejected", "prob_mean_chosen", "prob_mean_rejected")
            },
        }
        result["probabilities"][name] = {
            "chosen": scores.probabilities[k, 0].tolist(),
            "rejected": scores.probabilities[k, 1].tolist(),
        }
    return result


def _over_dimensions(column: np.ndarray) -> np.ndarray:
    """(P,) means over the dimensions that count; NaN where none does."""
    with np.errstate(invalid="ignore"):
        return np.nansum(column, 1) / (~np.isnan(column)).sum(1)


def _calibration(scores: Scores, k: int) -> dict[str, Any] | None:
    """Of the probability sigmoid(reward_chosen - reward_rejected) that the objective gives to a preference.

    {"error": mean over pairs of |accuracy - confidence| by bin, "bins": ...}, the expected calibration error of Guo et
    al. 2017 (arXiv 1706.04599) with bins of about equal numbers of pairs; None where no pair counts.
    """
    right = scores.column("accuracy")[:, k]
    counts = ~np.isnan(right)
    if not counts.any():
        return None
    difference = (scores.column("reward_chosen") - scores.column("reward_rejected"))[counts, k]
    confidence = 1 / (1 + np.exp(-np.abs(difference)))  # in the side that is preferred
    bins = []
    for part in np.array_split(np.argsort(confidence, kind="stable"), min(CALIBRATION_BINS, len(confidence))):
        found = {"confidence": float(confidence[part].mean()), "accuracy": float(right[counts][part].mean())}
        bins.append({**found, "pairs": len(part)})
    error = sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(confidence)
    return {"error": error, "bins": bins}


def _by_length(scores: Scores, accuracy: np.ndarray) -> list[dict[str, Any]]:
    """Groups of pairs with about equal numbers, by chosen minus rejected tokens; equal differences stay together."""
    difference = scores.lengths[:, 0] - scores.lengths[:, 1]
    cuts = np.unique(np.quantile(difference, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:-1], method="higher"))
    group = np.searchsorted(cuts, difference, side="right")
    groups = []
    for index in np.unique(group):
        here = group == index
        groups.append(
            {
                "from": int(difference[here].min()),
                "to": int(difference[here].max()),
                "pairs": int(here.sum()),
                "accuracy": Clusters(scores.prompts[here]).share(accuracy[here]),
            }
        )
    return groups


def _agreement(scores: Scores) -> dict[str, Any]:
    """K x K: share of pairs in which two dimensions prefer the same side, and correlation of their margins."""
    prefers, margin = scores.column("preference_accuracy"), scores.column("margin")
    names = range(len(scores.dimensions))

    def of(measure) -> list[list[float | None]]:
        both = ~np.isnan(prefers[:, :, None]) & ~np.isnan(prefers[:, None, :])
        return [[measure(i, j, both[:, i, j]) for j in names] for i in names]

    def same_side(i: int, j: int, both: np.ndarray) -> float | None:
        return float((prefers[both, i] == prefers[both, j]).mean()) if both.any() else None

    def correlation(i: int, j: int, both: np.ndarray) -> float | None:
        if both.sum() < 2 or not margin[both, i].std() or not margin[both, j].std():
            return None
        return float(np.corrcoef(margin[both, i], margin[both, j])[0, 1])

    return {
        "dimensions": list(scores.dimensions),
        "same_side": of(same_side),
        "margin_correlation": of(correlation),
    }


def difference(first: Scores, second: Scores) -> dict[str, Interval]:
    """second - first, paired by record: mean accuracy and, by dimension, accuracy, each with its 95 % interval.

    Raises ValueError where the two are not of the same pairs and dimensions.
    """
    if first.dimensions != second.dimensions or not np.array_equal(first.records, second.records):
        raise ValueError("evaluations of different pairs or dimensions cannot be compared")
    clusters = Clusters(first.prompts)
    change = second.column("accuracy") - first.column("accuracy")
    by_name = {name: clusters.mean(change[:, k]) for k, name in enumerate(first.dimensions)}
    return {"mean": clusters.mean(_over_dimensions(change)), **by_name}

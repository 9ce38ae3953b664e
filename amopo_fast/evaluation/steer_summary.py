"""Numbers of a steering experiment, with 95 % intervals over prompts: tables -> a dictionary for strict JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amopo_fast.evaluation.intervals import Clusters, Interval, unknown
from amopo_fast.evaluation.steer import Plan


def steer_summary(
    plan: Plan,
    models: Sequence[str],
    score_range: tuple[float, float],
    words: np.ndarray,
    *,
    judged: Sequence[str] = (),
    received: np.ndarray | None = None,
    wins: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    Args:
        words: (models, prompts, dimensions, levels) lengths of the answers.
        received: (models, prompts, dimensions, levels, judged) scores, NaN where there is none.
        wins: (models - 1, prompts, dimensions, levels) of each further model over the first, in the asked dimension,
            by a judge that compares; None: by the scores.

    Returns:
        prompts, levels, dimensions, judged, score_range; models: by name and asked dimension `words` (by level) and,
        by judged dimension, `by_level` (mean score), `change` (from the lowest to the highest level, prompt by prompt)
        and `rank_correlation` (of level and score). For each further model `difference` (its change minus the first
        model's) and `win_rates` (by level; ties count half), which are {} without a judge.
    """
    prompts, _, levels = plan.shape
    clusters = Clusters(np.arange(prompts))
    every = Clusters(np.repeat(np.arange(prompts), levels))
    asked_levels = np.tile(np.array(plan.levels), prompts)

    def of(model: int, d: int) -> dict[str, Any]:
        result: dict[str, Any] = {"words": [clusters.mean(words[model, :, d, k]) for k in range(levels)], "judged": {}}
        for j, name in enumerate(judged):
            scores = received[model, :, d, :, j]
            result["judged"][name] = {
                "by_level": [clusters.mean(scores[:, k]) for k in range(levels)],
                "change": clusters.mean(change(model, d, j)) if levels > 1 else unknown(),
                "rank_correlation": every.rank_correlation(asked_levels, scores.reshape(-1)),
            }
        return result

    def change(model: int, d: int, j: int) -> np.ndarray:
        return received[model, :, d, -1, j] - received[model, :, d, 0, j]

    def difference(model: int, d: int) -> dict[str, Interval]:
        if levels < 2:
            return {}
        return {name: clusters.mean(change(model, d, j) - change(0, d, j)) for j, name in enumerate(judged)}

    by = "verdicts" if wins is not None else "scores"
    if wins is None and received is not None:
        wins = _wins_by_scores(plan, judged, received)
    return {
        "prompts": prompts,
        "levels": list(plan.levels),
        "dimensions": list(plan.dimensions),
        "judged": list(judged),
        "score_range": list(score_range),
        "models": {
            name: {dimension: of(model, d) for d, dimension in enumerate(plan.dimensions)}
            for model, name in enumerate(models)
        },
        "difference": {
            name: {dimension: difference(model, d) for d, dimension in enumerate(plan.dimensions)}
            for model, name in enumerate(models)
            if model
        },
        "win_rates_by": by if wins is not None else None,
        "win_rates": {}
        if wins is None
        else {
            name: {
                dimension: [clusters.share(wins[model - 1, :, d, k]) for k in range(levels)]
                for d, dimension in enumerate(plan.dimensions)
            }
            for model, name in enumerate(models)
            if model
        },
    }


def _wins_by_scores(plan: Plan, judged: Sequence[str], received: np.ndarray) -> np.ndarray:
    """(models - 1, prompts, dimensions, levels): the higher score in the asked dimension wins, equal ones halve."""
    result = np.full((len(received) - 1, *received.shape[1:4]), np.nan)
    for d, name in enumerate(plan.dimensions):
        if name in judged:
            scores = received[:, :, d, :, list(judged).index(name)]
            result[:, :, d] = 0.5 + 0.5 * np.sign(scores[1:] - scores[:1])
    return result

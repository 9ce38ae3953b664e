"""Does the asked level change how likely the reference responses are? Exact, without generating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.errors import OptionError
from amopo_fast.evaluation.intervals import Clusters
from amopo_fast.evaluation.preferences import Scores

SIDES = ("logp_chosen", "logp_rejected")


def check_levels(levels: Sequence[float], score_range: tuple[float, float]) -> None:
    """Raises OptionError for levels that are not ascending within the range."""
    low, high = score_range
    if sorted(set(levels)) != list(levels) or any(not low <= level <= high for level in levels):
        found = ", ".join(f"{level:g}" for level in levels)
        raise OptionError(f"levels {found}: write each once, from low to high, within {low:g} to {high:g}", "levels")


def asked_summary(scores: Scores, asked: Mapping[float, Scores]) -> dict[str, Any]:
    """
    Args:
        scores: of the pairs as they are, for their score gaps. asked: of the same pairs by the level that every
            instruction named, ascending.

    Returns:
        levels; dimensions, each with `logp_chosen` and `logp_rejected` (nats per token) by level, `change` (of the
        difference logp_chosen - logp_rejected, highest minus lowest level) and `rank_correlation` of that change with
        the responses' score gap: a model that is steered makes the higher-scored response likelier when a higher score
        is asked for. With 95 % intervals over prompts.

    Raises ValueError where the levels are of different pairs.
    """
    levels = list(asked)
    if any(not np.array_equal(each.records, scores.records) for each in asked.values()):
        raise ValueError("the levels leave different pairs out: raise max_length, so that none is too long")
    clusters = Clusters(scores.prompts)
    result: dict[str, Any] = {"levels": levels, "dimensions": {}}
    for k, name in enumerate(scores.dimensions):
        if name == NO_OBJECT:  # its instruction names no score
            continue
        sides = {side: [each.column(side)[:, k] for each in asked.values()] for side in SIDES}
        differences = [a - b for a, b in zip(*sides.values(), strict=True)]
        change = differences[-1] - differences[0]
        result["dimensions"][name] = {
            **{side: [clusters.mean(column) for column in columns] for side, columns in sides.items()},
            "change": clusters.mean(change),
            "rank_correlation": clusters.rank_correlation(change, scores.score_gaps[:, k]),
        }
    return result

"""Several scored responses to one prompt into chosen and rejected ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any


def rank(scores: Mapping[str, Any], by: str, dimensions: Sequence[str]) -> float | None:
    """The number that a response is ranked by; None where one of its parts is missing or no number.

    `by` is one score, several joined by +, or "mean" over those of `dimensions` that the response has.
    """
    if by == "mean":
        known = [number for name in dimensions if (number := _number(scores.get(name))) is not None]
        return math.fsum(known) / len(known) if known else None
    parts = [_number(scores.get(name.strip())) for name in by.split("+")]
    return None if any(part is None for part in parts) else math.fsum(parts)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def ranked_pairs(ranks: Sequence[float | None], which: str) -> Iterator[tuple[int, int]]:
    """(better, worse) positions of responses of unequal rank; none where all are equal or unranked.

    "best_worst" gives at most one, "all" every one; among equals the earlier response stands for the rank.
    """
    known = [index for index, value in enumerate(ranks) if value is not None]
    if which == "best_worst":
        if known:
            best = max(known, key=lambda index: (ranks[index], -index))
            worst = min(known, key=lambda index: (ranks[index], index))
            if ranks[best] > ranks[worst]:
                yield best, worst
        return
    for a, b in combinations(known, 2):
        if ranks[a] != ranks[b]:
            yield (a, b) if ranks[a] > ranks[b] else (b, a)

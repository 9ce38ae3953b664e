"""UltraFeedback (openbmb/UltraFeedback): four completions of an instruction, each rated in four aspects.

    {"instruction": str, "completions": [{"response": str, "overall_score": float, "fine-grained_score": float,
        "annotations": {"helpfulness": {"Rating": "1".."5" or "N/A", "Rationale": str, ...}, "honesty": {...},
                        "instruction_following": {...}, "truthfulness": {...}}, ...}, ...], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amopo_fast.data.sources.amopo_json import as_object
from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord, extras_of
from amopo_fast.data.sources.ranking import rank, ranked_pairs
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "ultrafeedback"
READS = ("rank_by", "pairs")
SCORE_RANGE = (1.0, 5.0)
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def recognizes(value: dict[str, Any]) -> bool:
    return "instruction" in value and "completions" in value


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    """Pairs of completions by overall_score, unless the source says otherwise; equal ones make no pair."""
    for raw in raws:
        if isinstance(raw, DataError):
            yield raw
            continue
        try:
            yield from _candidates(raw, source, dimensions)
        except DataError as error:
            yield error


def _candidates(raw: RawRecord, source: Source, dimensions: Sequence[str]) -> Iterator[Candidate | Dropped]:
    def error(kind: str, found: Any, remedy: str, field: str) -> DataError:
        return DataError(
            kind, shown(found), remedy, source=str(source), record=raw.record, line=raw.line, field=field
        )

    value = as_object(raw, str(source), "write an object with the keys instruction and completions")
    completions = value.get("completions", MISSING)
    if not isinstance(completions, list) or any(not isinstance(item, dict) for item in completions):
        kind = "missing field" if completions is MISSING else "wrong type"
        raise error(kind, completions, "write a list of objects with response and annotations", "completions")
    if len(completions) < 2:
        yield Dropped(raw.record, "fewer than two completions")
        return
    by = source.rank_by or "overall_score"
    scores = [_ratings(item) for item in completions]
    known = [name for name in dimensions if name in ASPECTS] or ASPECTS
    ranks = [rank({**_numbers(item), **rated}, by, known) for item, rated in zip(completions, scores, strict=True)]
    unranked = next((index for index, number in enumerate(ranks) if number is None), None)
    if unranked is not None:
        remedy = "add the score, or name another with the source's rank_by, as rank_by=mean"
        raise error("missing field", MISSING, remedy, f"completions[{unranked}].{by}")
    found = list(ranked_pairs(ranks, source.pairs))
    if not found:
        yield Dropped(raw.record, f"a tie in {by}")
    for part, (chosen, rejected) in enumerate(found):
        yield Candidate(
            record=raw.record,
            line=raw.line,
            prompt=value.get("instruction", MISSING),
            chosen=completions[chosen].get("response", MISSING),
            rejected=completions[rejected].get("response", MISSING),
            chosen_scores={name: scores[chosen][name] for name in dimensions if name in scores[chosen]},
            rejected_scores={name: scores[rejected][name] for name in dimensions if name in scores[rejected]},
            names={
                "prompt": "instruction",
                "chosen": f"completions[{chosen}].response",
                "rejected": f"completions[{rejected}].response",
                **{f"chosen.{a}": f"completions[{chosen}].annotations.{a}.Rating" for a in ASPECTS},
                **{f"rejected.{a}": f"completions[{rejected}].annotations.{a}.Rating" for a in ASPECTS},
            },
            part=part,
            extras=extras_of(value),
        )


def _ratings(completion: dict[str, Any]) -> dict[str, Any]:
    """Ratings by aspect; the source writes them as text, and N/A where there is none."""
    annotations = completion.get("annotations")
    ratings: dict[str, Any] = {}
    for aspect, entry in annotations.items() if isinstance(annotations, dict) else ():
        rating = entry.get("Rating") if isinstance(entry, dict) else None
        if isinstance(rating, str):
            try:
                rating = float(rating)
            except ValueError:
                rating = None if rating.strip().upper() == "N/A" else rating
        ratings[aspect] = rating
    return ratings


def _numbers(completion: dict[str, Any]) -> dict[str, float]:
    """The completion's own scores, of which some are written as text."""
    numbers = {}
    for name, value in completion.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers


def score_names(value: dict[str, Any]) -> set[str]:
    completions = value.get("completions")
    first = completions[0] if isinstance(completions, list) and completions else None
    return set(_ratings(first)) if isinstance(first, dict) else set()

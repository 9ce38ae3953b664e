"""From a source to validated pairs of text, and to what is wrong with its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

from amopo_fast.data.checking import make_pair
from amopo_fast.data.pair import (
    DEFAULT_DIMENSIONS,
    DEFAULT_SCORE_RANGE,
    PARTS,
    Message,
    Pair,
    check_dimensions,
    last_user,
    number_of,
    record_of,
)
from amopo_fast.data.sources.candidate import NO_OBJECT, Candidate, Dropped
from amopo_fast.data.sources.formats import OpenSource, open_source
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError

__all__ = [
    "DEFAULT_DIMENSIONS",
    "DEFAULT_SCORE_RANGE",
    "NO_OBJECT",
    "PARTS",
    "DataError",
    "Message",
    "Pair",
    "Reading",
    "Records",
    "check_dimensions",
    "check_known",
    "iter_records",
    "last_user",
    "make_pair",
    "no_usable_record",
    "number_of",
    "read_pairs",
    "read_records",
    "record_of",
]


class Records(NamedTuple):
    """What a source holds: its pairs, its bad records, and how many records have no preference in them, by reason."""

    pairs: list[Pair]
    errors: list[DataError]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Reading:
    """How records become pairs; the choices of DataConfig.

    Raises ValueError for dimensions, a score range or a choice that makes no sense.
    """

    dimensions: Sequence[str]
    score_range: tuple[float, float] = (0, 5)
    missing_scores: Literal["error", "absent"] = "error"
    tied_dimensions: Literal["keep", "drop"] = "keep"

    def __post_init__(self):
        check_dimensions(self.dimensions, self.score_range)
        for name, choices in (("missing_scores", ("error", "absent")), ("tied_dimensions", ("keep", "drop"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")


def read_pairs(
    path: str | Path | Source,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = (0, 5),
    on_bad_record: Literal["error", "skip"] = "error",
    missing_scores: Literal["error", "absent"] = "error",
    tied_dimensions: Literal["keep", "drop"] = "keep",
) -> tuple[list[Pair], list[DataError]]:
    """Pairs of a source in any of the formats, and the records that were skipped.

    Raises:
        DataError: the source as a whole cannot be used, no record has one of the dimensions, or no record is left; with
            `on_bad_record="error"` also for the first bad record.
        ValueError: `dimensions`, `score_range` or one of the choices makes no sense.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record must be 'error' or 'skip', got {on_bad_record!r}")
    source = Source.parse(path)
    reading = Reading(dimensions, score_range, missing_scores, tied_dimensions)
    pairs, errors, dropped = read_records(source, reading)
    if errors and on_bad_record == "error":
        raise errors[0]
    if not pairs:
        raise no_usable_record(str(source), errors, dropped)
    return pairs, errors


def no_usable_record(source: str, errors: Sequence[DataError], dropped: Mapping[str, int]) -> DataError:
    found = f"all {len(errors)} records are bad, the first: {errors[0]}" if errors else ""
    if dropped:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
        found = f"{found}; " * bool(found) + f"records without a preference: {reasons}"
    return DataError("no usable record", found or "no records", "correct them", source=source)


def read_records(source: str | Path | Source, reading: Reading) -> Records:
    """Every pair, bad record and dropped record of a source. Raises DataError for mistakes of it as a whole."""
    pairs, errors, dropped = [], [], Counter()
    for item in iter_records(open_source(Source.parse(source)), reading):
        if isinstance(item, Pair):
            pairs.append(item)
        elif isinstance(item, DataError):
            errors.append(item)
        else:
            dropped[item.reason] += 1
    return Records(pairs, errors, dict(dropped))


NO_SCORES = "no scores"  # kind of the error of data that knows a preference alone
_LOOKED_AHEAD = 1000  # records; a shorter source is known whole before its first record is judged


def iter_records(
    opened: OpenSource, reading: Reading, *, one_of_several: bool = False
) -> Iterator[Pair | DataError | Dropped]:
    """The pairs of a source one at a time; a DataError or Dropped in the place of a record that makes none.

    Scores are validated in the source's own range and mapped from it to `reading.score_range`.

    Args:
        one_of_several: of a run's sources: where missing scores are absent, another one may have a dimension that this
            one has not; `check_known` tells once all are read.

    Raises DataError where the source breaks off or no record has one of the dimensions.
    """
    alone = not (one_of_several and reading.missing_scores == "absent")
    candidates = opened.candidates(reading.dimensions)
    head = list(islice(candidates, _LOOKED_AHEAD))
    seen: set[str] = set()
    whole = 0
    if len(head) < _LOOKED_AHEAD and alone:
        found = [item for item in head if isinstance(item, Candidate)]
        names = {name for item in found for name, score in item.chosen_scores.items() if score is not None}
        if found:
            check_known(reading, names | opened.score_names, str(opened.source))
    for item in chain(head, candidates):
        if isinstance(item, Candidate):
            whole += 1
            seen |= {name for name, score in item.chosen_scores.items() if score is not None}
            try:
                yield _pair(item, opened, reading)
            except DataError as error:
                yield error
        else:
            yield item
    opened.score_names |= seen
    if whole and alone:
        check_known(reading, opened.score_names, str(opened.source))


def _pair(candidate: Candidate, opened: OpenSource, reading: Reading) -> Pair | Dropped:
    own = opened.score_range or reading.score_range
    pair = make_pair(
        candidate,
        dimensions=reading.dimensions,
        score_range=own,
        missing_scores=reading.missing_scores,
        source=str(opened.source),
    )
    if own != tuple(reading.score_range):
        scores = [_mapped(side, own, reading.score_range) for side in (pair.chosen_scores, pair.rejected_scores)]
        pair = replace(pair, chosen_scores=scores[0], rejected_scores=scores[1])
    if reading.tied_dimensions == "keep":
        return pair
    kept = {n: s for n, s in pair.chosen_scores.items() if n not in pair.rejected_scores or s > pair.rejected_scores[n]}
    if not kept and NO_OBJECT not in reading.dimensions:
        return Dropped(pair.record, "no dimension that prefers the chosen response")
    return replace(pair, chosen_scores=kept)


def _mapped(scores: dict[str, float], own: tuple[float, float], to: tuple[float, float]) -> dict[str, float]:
    scale = (to[1] - to[0]) / (own[1] - own[0])
    return {name: round(to[0] + (score - own[0]) * scale, 4) for name, score in scores.items()}


def check_known(reading: Reading, known: Set[str], source: str) -> None:
    """Raises DataError for a dimension that is none of the known scores: one misspelt name, not a thousand records."""
    wanted = [name for name in reading.dimensions if name != NO_OBJECT]
    if wanted and not known:
        raise DataError(
            NO_SCORES,
            f"no record has a score '{wanted[0]}', nor any other",
            "let a judge score the pairs with amopo-fast score",
            source=source,
        )
    for name in wanted:
        if name not in known:
            raise DataError(
                "unknown dimension",
                f"no record has a score '{name}'; scores found: {', '.join(sorted(known))}",
                "set dimensions to names that the data has",
                source=source,
                field=name,
            )

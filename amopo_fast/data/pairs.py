"""From a file to validated pairs of text. A Pair knows no tokens; every format goes through `make_pair`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from amopo_fast.data.sources.candidate import MISSING, NO_OBJECT, Candidate, Dropped
from amopo_fast.data.sources.formats import OpenSource, open_source
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

__all__ = [
    "DEFAULT_DIMENSIONS",
    "NO_OBJECT",
    "DataError",
    "Message",
    "Pair",
    "Reading",
    "Records",
    "check_dimensions",
    "iter_records",
    "make_pair",
    "read_pairs",
    "read_records",
]

DEFAULT_SCORE_RANGE = (0.0, 5.0)
DEFAULT_DIMENSIONS = (NO_OBJECT, "helpfulness", "correctness", "instruction_following")  # the paper's
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One prompt with a chosen and a rejected response.

    Attributes:
        record: number of the record in its source, from 0; noise and errors use it.
        messages: the conversation up to the response; its last message is the user's.
        chosen, rejected: the responses.
        chosen_scores, rejected_scores: by dimension; a missing key is a missing score.
        source: file or data-set name, for messages.
        part: tells apart the pairs of one record that holds several.
    """

    record: int
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_scores: dict[str, float] = field(default_factory=dict)
    rejected_scores: dict[str, float] = field(default_factory=dict)
    source: str = ""
    part: int = 0


PARTS = 1 << 32  # a run numbers the pairs of a record: record + part * PARTS


def number_of(pair: Pair) -> int:
    """The pair's number in its source, which tells apart the pairs of one record."""
    return pair.record + pair.part * PARTS


def record_of(number: int) -> int:
    """The record of a pair's number."""
    return number % PARTS


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


def check_dimensions(dimensions: Sequence[str], score_range: tuple[float, float]) -> None:
    """Raises ValueError for dimension names or a score range that no data could satisfy."""
    if isinstance(dimensions, str) or not dimensions:
        raise ValueError(f"dimensions must be a non-empty list of names, got {dimensions!r}")
    if any(not isinstance(name, str) or not name.strip() for name in dimensions):
        raise ValueError(f"dimensions must be non-empty names, got {list(dimensions)!r}")
    if len(set(dimensions)) != len(dimensions):
        raise ValueError(f"dimensions must differ from each other, got {list(dimensions)!r}")
    if len(score_range) != 2 or not all(math.isfinite(bound) for bound in score_range):
        raise ValueError(f"score_range must be two finite numbers, got {score_range!r}")
    if score_range[0] >= score_range[1]:
        raise ValueError(f"score_range must go from low to high, got {score_range!r}")


def make_pair(
    candidate: Candidate,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = (0, 5),
    missing_scores: Literal["error", "absent"] = "error",
    source: str = "",
) -> Pair:
    """The pair that a candidate holds.

    A score that is null counts as missing. `missing_scores="absent"` leaves it out of the pair, so that the dimension
    is absent where it is the chosen side's; "error" makes it a bad record.

    Raises:
        DataError: a missing field, a wrong type (also a bool, NaN or infinity as a score), an empty prompt or
            response, text that UTF-8 cannot hold, a score out of range, identical responses, no score at all.
    """
    check = _Check(candidate, source)
    messages = check.messages(candidate.prompt)
    chosen = check.text(candidate.chosen, "chosen", "write the response as a string")
    rejected = check.text(candidate.rejected, "rejected", "write the response as a string")
    # Outer blanks are no preference either, and many chat templates strip them.
    if chosen.strip() == rejected.strip():
        raise check.error(
            "identical sides",
            "rejected",
            "the same text as the chosen response",
            "drop the record: it has no preference",
        )
    scores = [
        check.scores(by_dimension, side, dimensions, score_range, missing_scores)
        for side, by_dimension in (("chosen", candidate.chosen_scores), ("rejected", candidate.rejected_scores))
    ]
    if NO_OBJECT not in dimensions and not scores[0]:
        raise check.error(
            "missing field", "chosen", f"no score for any of {', '.join(dimensions)}", "add a score or drop the record"
        )
    return Pair(candidate.record, messages, chosen, rejected, scores[0], scores[1], source, candidate.part)


class _Check:
    """Validates the parts of one candidate; every error names its place."""

    def __init__(self, candidate: Candidate, source: str):
        self.candidate, self.source = candidate, source

    def error(self, kind: str, part: str, found: str, remedy: str) -> DataError:
        name = self.candidate.names.get(part, part)
        return DataError(
            kind, found, remedy, source=self.source, record=self.candidate.record, line=self.candidate.line, field=name
        )

    def text(self, value: Any, part: str, remedy: str, may_be_empty: bool = False) -> str:
        if value is MISSING or value is None:
            raise self.error("missing field", part, "nothing" if value is MISSING else "null", remedy)
        if not isinstance(value, str):
            raise self.error("wrong type", part, shown(value), remedy)
        if not value.strip() and not may_be_empty:
            raise self.error("empty text", part, shown(value), "fill it in or drop the record")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half of a surrogate pair, \\u{ord(value[error.start]):04x}, at character {error.start}"
            raise self.error("invalid text", part, found, "write the character whole, or remove it") from None
        return value

    def messages(self, prompt: Any) -> tuple[Message, ...]:
        remedy = "write the prompt as a string, or as a list of messages with role and content"
        if not isinstance(prompt, (list, tuple)):
            return (Message("user", self.text(prompt, "prompt", remedy)),)
        if not prompt:
            raise self.error("empty text", "prompt", "a list without messages", remedy)
        messages = []
        for index, message in enumerate(prompt):
            part = f"prompt[{index}]"
            if not isinstance(message, Mapping):
                raise self.error("wrong type", part, shown(message), remedy)
            role = message.get("role", MISSING)
            if role not in ROLES:
                kind = "missing field" if role is MISSING else "unknown role"
                raise self.error(kind, f"{part}.role", shown(role), f"use one of {', '.join(ROLES)}")
            content = message.get("content", MISSING)
            messages.append(
                Message(role, self.text(content, f"{part}.content", remedy, may_be_empty=role != "user"))
            )
        if messages[-1].role != "user":
            raise self.error(
                "wrong order",
                f"prompt[{len(messages) - 1}].role",
                f"the last message is the {messages[-1].role}'s",
                "end the prompt with the user's message; the responses belong into chosen and rejected",
            )
        return tuple(messages)

    def scores(
        self,
        by_dimension: Mapping[str, Any],
        side: str,
        dimensions: Sequence[str],
        score_range: tuple[float, float],
        missing_scores: str,
    ) -> dict[str, float]:
        scores = {}
        low, high = score_range
        for name in dimensions:
            if name == NO_OBJECT:
                continue
            value = by_dimension.get(name)
            part = f"{side}.{name}"
            if value is None:
                if missing_scores == "error":
                    found = "null" if name in by_dimension else "nothing"
                    remedy = "add the score, or read the data with missing_scores=absent"
                    raise self.error("missing field", part, found, remedy)
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self.error("wrong type", part, shown(value), f"write a number from {low:g} to {high:g}, unquoted")
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error("wrong type", part, f"{value}, not finite", f"write a number from {low:g} to {high:g}")
            if not low <= value <= high:
                remedy = f"write a number from {low:g} to {high:g}, or set score_range to what the data uses"
                raise self.error("score out of range", part, shown(value), remedy)
            scores[name] = float(value)
        return scores


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


_LOOKED_AHEAD = 1000  # records; a shorter source is known whole before its first record is judged


def iter_records(opened: OpenSource, reading: Reading) -> Iterator[Pair | DataError | Dropped]:
    """The pairs of a source one at a time; a DataError or Dropped in the place of a record that makes none.

    Scores are validated in the source's own range and mapped from it to `reading.score_range`.

    Raises DataError where the source breaks off or no record has one of the dimensions.
    """
    candidates = opened.candidates(reading.dimensions)
    head = list(islice(candidates, _LOOKED_AHEAD))
    seen: set[str] = set()
    whole = 0
    if len(head) < _LOOKED_AHEAD:
        found = [item for item in head if isinstance(item, Candidate)]
        names = {name for item in found for name, score in item.chosen_scores.items() if score is not None}
        if found:
            _check_known(reading, names, opened)
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
    if whole:
        _check_known(reading, seen, opened)


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


def _check_known(reading: Reading, seen: set[str], opened: OpenSource) -> None:
    """A dimension that no record has is a misspelt name, not a thousand bad records."""
    for name in reading.dimensions:
        if name != NO_OBJECT and name not in seen | opened.score_names:
            raise DataError(
                "unknown dimension",
                f"no record has a score '{name}'; scores found: {', '.join(sorted(opened.score_names)) or 'none'}",
                "set dimensions to names that the data has",
                source=str(opened.source),
                field=name,
            )

"""From a file to validated pairs of text. A Pair knows no tokens; every format goes through `make_pair`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from amopo_fast.errors import DataError, shown
from amopo_fast.sources import amopo_json
from amopo_fast.sources.candidate import MISSING, Candidate
from amopo_fast.sources.files import raw_records

__all__ = [
    "DEFAULT_DIMENSIONS",
    "NO_OBJECT",
    "DataError",
    "Message",
    "Pair",
    "check_dimensions",
    "make_pair",
    "read_pairs",
    "read_records",
]

NO_OBJECT = "no_object"  # the dimension whose instruction names all the others and no score
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
    """

    record: int
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_scores: dict[str, float] = field(default_factory=dict)
    rejected_scores: dict[str, float] = field(default_factory=dict)
    source: str = ""


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
    return Pair(candidate.record, messages, chosen, rejected, scores[0], scores[1], source)


class _Check:
    """Validates the parts of one candidate; every error names its place."""

    def __init__(self, candidate: Candidate, source: str):
        self.candidate, self.source = candidate, source

    def error(self, kind: str, part: str, found: str, remedy: str) -> DataError:
        name = self.candidate.names.get(part, part)
        where = {"source": self.source, "record": self.candidate.record, "line": self.candidate.line}
        return DataError(kind, found, remedy, field=name, **where)

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
    path: str | Path,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = (0, 5),
    on_bad_record: Literal["error", "skip"] = "error",
    missing_scores: Literal["error", "absent"] = "error",
) -> tuple[list[Pair], list[DataError]]:
    """Pairs of a file in the reference code's format (.json, .jsonl, .ndjson), and the records that were skipped.

    Raises:
        DataError: the file as a whole cannot be used, no record has one of the dimensions, or no record is left; with
            `on_bad_record="error"` also for the first bad record.
        ValueError: `dimensions`, `score_range` or one of the choices makes no sense.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record must be 'error' or 'skip', got {on_bad_record!r}")
    pairs, errors = read_records(path, dimensions=dimensions, score_range=score_range, missing_scores=missing_scores)
    if errors and on_bad_record == "error":
        raise errors[0]
    if not pairs:
        raise DataError(
            "no usable record",
            f"all {len(errors)} records are bad, the first: {errors[0]}",
            "correct them",
            source=str(path),
        )
    return pairs, errors


def read_records(
    path: str | Path,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = (0, 5),
    missing_scores: Literal["error", "absent"] = "error",
) -> tuple[list[Pair], list[DataError]]:
    """As `read_pairs`, but returns every bad record and raises only for mistakes of the file as a whole."""
    check_dimensions(dimensions, score_range)
    if missing_scores not in ("error", "absent"):
        raise ValueError(f"missing_scores must be 'error' or 'absent', got {missing_scores!r}")
    source = str(path)
    candidates: list[Candidate | DataError] = []
    names: set[str] = set()
    for raw in raw_records(path):
        if isinstance(raw, DataError):
            candidates.append(raw)
            continue
        names |= amopo_json.score_names(raw)
        try:
            candidates.append(amopo_json.candidate(raw, dimensions, source))
        except DataError as error:
            candidates.append(error)
    _check_known(candidates, dimensions, names, source)
    pairs, errors = [], []
    for candidate in candidates:
        if isinstance(candidate, DataError):
            errors.append(candidate)
            continue
        try:
            pairs.append(
                make_pair(
                    candidate,
                    dimensions=dimensions,
                    score_range=score_range,
                    missing_scores=missing_scores,
                    source=source,
                )
            )
        except DataError as error:
            errors.append(error)
    return pairs, errors


def _check_known(
    candidates: Sequence[Candidate | DataError], dimensions: Sequence[str], names: set[str], source: str
) -> None:
    """A dimension that no record has is a misspelt name, not a thousand bad records."""
    whole = [candidate for candidate in candidates if isinstance(candidate, Candidate)]
    for name in dimensions:
        if whole and name != NO_OBJECT and all(candidate.chosen_scores.get(name) is None for candidate in whole):
            raise DataError(
                "unknown dimension",
                f"no record has a score '{name}'; scores found: {', '.join(sorted(names)) or 'none'}",
                "set dimensions to names that the data has",
                source=source,
                field=f"chosen.{name}",
            )

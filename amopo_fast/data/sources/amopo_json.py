"""The AMoPO reference code's format:

    {"prompt": str, "chosen": {"response": str, "helpfulness": int, ...}, "rejected": {...}}

A response may also have `reasoning_content` and `tool_calls`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord, extras_of, one_a_record
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "amopo"
READS = ()
SCORE_RANGE = None  # whatever the configuration says


def recognizes(value: dict[str, Any]) -> bool:
    return any(isinstance(value.get(side), dict) for side in ("chosen", "rejected"))


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    """Keys other than the configured dimensions are left alone."""
    return one_a_record(raws, lambda raw: _candidate(raw, dimensions, str(source)))


def _candidate(raw: RawRecord, dimensions: Sequence[str], source: str) -> Candidate:
    value = as_object(raw, source, "write an object with the keys prompt, chosen and rejected")
    for side in ("chosen", "rejected"):
        if side in value and not isinstance(value[side], dict):
            raise DataError(
                "wrong type",
                shown(value[side]),
                "write an object with the key response and one score per dimension",
                source=source,
                record=raw.record,
                line=raw.line,
                field=side,
            )
    chosen, rejected = (value.get(side, {}) for side in ("chosen", "rejected"))
    return Candidate(
        record=raw.record,
        line=raw.line,
        prompt=value.get("prompt", MISSING),
        chosen=_response(chosen),
        rejected=_response(rejected),
        chosen_scores={name: chosen[name] for name in dimensions if name in chosen},
        rejected_scores={name: rejected[name] for name in dimensions if name in rejected},
        names={"chosen": "chosen.response", "rejected": "rejected.response"},
        extras=extras_of(value),
    )


def _response(side: dict[str, Any]) -> Any:
    text = side.get("response", MISSING)
    more = {name: side[name] for name in ("reasoning_content", "tool_calls") if side.get(name) is not None}
    return {"content": text, **more} if more else text


def as_object(raw: RawRecord, source: str, remedy: str) -> dict[str, Any]:
    """The record as a mapping. Raises DataError where it is anything else, so that there are no parts to look at."""
    if not isinstance(raw.value, dict):
        raise DataError(
            "wrong type", shown(raw.value), remedy, source=source, record=raw.record, line=raw.line
        )
    return raw.value


def score_names(value: dict[str, Any]) -> set[str]:
    """Keys of the chosen side that look like scores, to tell a user which dimensions the data has."""
    chosen = value.get("chosen")
    return numbers_of(chosen) if isinstance(chosen, dict) else set()


def numbers_of(value: dict[str, Any]) -> set[str]:
    return {name for name, item in value.items() if isinstance(item, (int, float)) and not isinstance(item, bool)}

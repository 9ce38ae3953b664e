"""ShareGPT's turns with a preference, as LLaMA-Factory takes them for DPO:

    {"conversations": [{"from": "human", "value": "..."}, ...],
     "chosen": {"from": "gpt", "value": "...", "helpfulness": 4}, "rejected": {...}, "system": "..."}

A score stands in its response, or where `trl` looks for it (`NAME_chosen`, `chosen_NAME`, `chosen_scores`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amopo_fast.data.sources import trl
from amopo_fast.data.sources.amopo_json import as_object, numbers_of
from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord, extras_of, one_a_record
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "sharegpt"
READS = ()
SCORE_RANGE = None
_SIDES = ("chosen", "rejected")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def recognizes(value: dict[str, Any]) -> bool:
    return "conversations" in value and all(isinstance(value.get(side), dict) for side in _SIDES)


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    return one_a_record(raws, lambda raw: _candidate(raw, str(source), dimensions))


def _candidate(raw: RawRecord, source: str, dimensions: Sequence[str]) -> Candidate:
    value = as_object(raw, source, "write an object with the keys conversations, chosen and rejected")
    sides, scores, names = [], [], {"prompt": "conversations", ".role": "from", ".content": "value"}
    for side in _SIDES:
        own = value.get(side, MISSING)
        if not isinstance(own, dict):
            raise DataError(
                "missing field" if own is MISSING else "wrong type",
                shown(own),
                "write an object with the keys from and value, and a score per dimension",
                source=source,
                record=raw.record,
                line=raw.line,
                field=side,
            )
        found, spelt = trl.scores_of(value, side, dimensions)
        for name in dimensions:
            if name in own:
                found[name], spelt[f"{side}.{name}"] = own[name], f"{side}.{name}"
        scores.append(found)
        names |= {**spelt, side: f"{side}.value"}
        sides.append(_message(own)["content"])
    turns = value.get("conversations", MISSING)
    if isinstance(turns, list):
        turns = [_message(turn) for turn in turns]
    elif turns is not MISSING and turns is not None:
        raise DataError(
            "wrong type", shown(turns), "write a list of turns with from and value", source=source, record=raw.record,
            line=raw.line, field="conversations",
        )  # fmt: skip
    return Candidate(
        raw.record, turns, sides[0], sides[1], scores[0], scores[1], raw.line, names, extras=extras_of(value)
    )


def _message(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get("from", MISSING)
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": turn.get("value", MISSING)}


def score_names(value: dict[str, Any]) -> set[str]:
    chosen = value.get("chosen")
    return trl.score_names(value) | (numbers_of(chosen) if isinstance(chosen, dict) else set())

"""TRL's preference format, with a column per score.

    {"prompt": "...", "chosen": "...", "rejected": "...", "helpfulness_chosen": 4, "helpfulness_rejected": 2}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], ...}
    {"chosen": [whole conversation], "rejected": [whole conversation], ...}

A score stands in one of these, tried in this order: `NAME_chosen`, `chosen_NAME`, the mapping `chosen_scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amopo_fast.data.sources.amopo_json import as_object
from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "trl"
SCORE_RANGE = None
_SIDES = ("chosen", "rejected")


def recognizes(value: dict[str, Any]) -> bool:
    return all(isinstance(value.get(side), (str, list)) for side in _SIDES)


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    for raw in raws:
        try:
            yield raw if isinstance(raw, DataError) else _candidate(raw, str(source), dimensions)
        except DataError as error:
            yield error


def _candidate(raw: RawRecord, source: str, dimensions: Sequence[str]) -> Candidate:
    value = as_object(raw, source, "write an object with the keys prompt, chosen and rejected")
    names, scores = {}, []
    for side in _SIDES:
        found = {}
        for name in dimensions:
            column, score = _score(value, name, side)
            if column:
                found[name], names[f"{side}.{name}"] = score, column
            else:
                names[f"{side}.{name}"] = f"{name}_{side}"
        scores.append(found)
    prompt = value.get("prompt", MISSING)
    sides = [value.get(side, MISSING) for side in _SIDES]
    if any(isinstance(side, list) for side in sides):
        prompt, sides = _conversations(prompt, sides, raw, source)
    return Candidate(raw.record, prompt, sides[0], sides[1], scores[0], scores[1], raw.line, names)


def _score(value: dict[str, Any], name: str, side: str) -> tuple[str, Any]:
    for column in (f"{name}_{side}", f"{side}_{name}"):
        if column in value:
            return column, value[column]
    scores = value.get(f"{side}_scores")
    if isinstance(scores, dict) and name in scores:
        return f"{side}_scores.{name}", scores[name]
    return "", None


def _conversations(prompt: Any, sides: list[Any], raw: RawRecord, source: str) -> tuple[Any, list[Any]]:
    """Prompt and responses of sides that are lists of messages: each repeats the prompt or goes on from it.

    The response is the last message. Turns before it belong to the prompt and have to be the same on both sides.
    """

    def error(kind: str, found: str, remedy: str, field: str) -> DataError:
        return DataError(kind, found, remedy, source=source, record=raw.record, line=raw.line, field=field)

    responses, before = [], []
    for name, side in zip(_SIDES, sides, strict=True):
        last = side[-1] if isinstance(side, list) and side else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise error(
                "wrong type" if not isinstance(side, list) else "wrong order",
                shown(last if isinstance(side, list) else side),
                "write both sides as strings, or both as lists of messages whose last is the assistant's",
                name,
            )
        responses.append(last.get("content", MISSING))
        before.append(side[:-1])
    if before[0] != before[1]:
        raise error(
            "different conversations",
            "messages before the last one that differ from those of chosen",
            "make the sides differ in their last message only; one pair is one preference",
            "rejected",
        )
    turns = before[0]
    if prompt is MISSING or prompt is None:
        if not turns:
            raise error("missing field", "nothing", "add the prompt, or begin both sides with it", "prompt")
        return turns, responses
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and turns[: len(prompt)] != prompt:
        turns = [*prompt, *turns]
    return (turns if isinstance(prompt, list) else prompt), responses


def score_names(value: dict[str, Any]) -> set[str]:
    scores = value.get("chosen_scores")
    names = set(scores) if isinstance(scores, dict) else set()
    for column in value:
        for affix, name in ((column.endswith("_chosen"), column[:-7]), (column.startswith("chosen_"), column[7:])):
            if affix and name != "scores":
                names.add(name)
    return names

"""TRL's preference format, with a column per score.

    {"prompt": "...", "chosen": "...", "rejected": "...", "helpfulness_chosen": 4, "helpfulness_rejected": 2}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], ...}
    {"chosen": [whole conversation], "rejected": [whole conversation], ...}     a prompt that is there too is recognised

A score stands in one of these, tried in this order: `NAME_chosen`, `chosen_NAME`, the mapping `chosen_scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amopo_fast.data.sources.amopo_json import as_object
from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord, extras_of, one_a_record
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "trl"
READS = ()
SCORE_RANGE = None
_SIDES = ("chosen", "rejected")


def recognizes(value: dict[str, Any]) -> bool:
    return all(isinstance(value.get(side), (str, list)) for side in _SIDES)


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    return one_a_record(raws, lambda raw: _candidate(raw, str(source), dimensions))


def _candidate(raw: RawRecord, source: str, dimensions: Sequence[str]) -> Candidate:
    value = as_object(raw, source, "write an object with the keys prompt, chosen and rejected")
    names, scores = {}, []
    for side in _SIDES:
        found, spelt = scores_of(value, side, dimensions)
        scores.append(found)
        names |= spelt
    prompt = value.get("prompt", MISSING)
    sides = [value.get(side, MISSING) for side in _SIDES]
    if any(isinstance(side, list) for side in sides):
        implicit = prompt is MISSING or prompt is None
        for name, side in zip(_SIDES, sides, strict=True):
            last = f"{name}[{len(side) - 1 if isinstance(side, list) else 0}]"
            names |= {f"{name}.{part}": f"{last}.{part}" for part in ("tool_calls", "reasoning_content")}
            names |= {name: f"{last}.content", "prompt": "chosen" if implicit else "prompt"}
        prompt, sides = _conversations(prompt, sides, raw, source)
    return Candidate(
        raw.record, prompt, sides[0], sides[1], scores[0], scores[1], raw.line, names, extras=extras_of(value)
    )


def scores_of(value: dict[str, Any], side: str, dimensions: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(scores of a side by dimension, how the record spells them or is expected to)."""
    found, names = {}, {}
    for name in dimensions:
        column, score = _score(value, name, side)
        if column:
            found[name] = score
        listed = isinstance(value.get(f"{side}_scores"), dict)
        names[f"{side}.{name}"] = column or (f"{side}_scores.{name}" if listed else f"{name}_{side}")
    return found, names


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

    responses = [side[-1] if isinstance(side, list) and side else None for side in sides]
    bad = [index for index, last in enumerate(responses) if _role(last) != "assistant"]
    if bad:
        # A list that is no conversation says more than a text beside one.
        index = next((index for index in bad if isinstance(sides[index], list)), bad[0])
        listed = isinstance(sides[index], list)
        raise error(
            "wrong order" if listed else "wrong type",
            shown(responses[index] if listed else sides[index]),
            "write both sides as strings, or both as lists of messages whose last is the assistant's",
            _SIDES[index],
        )
    before = [side[:-1] for side in sides]
    if not _same(before[0], before[1]):
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
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not turns or not isinstance(asked, list):
        return prompt if not turns else asked, responses
    # The prompt is repeated with a system message before it, without its own, or as it is.
    for skipped in range(2):
        if _role(turns[0]) == "system" and skipped and _same(turns[skipped : skipped + len(asked)], asked):
            return [*turns[:skipped], *asked, *turns[skipped + len(asked) :]], responses
        if _same(turns[: len(asked) - skipped], asked[skipped:]) and (not skipped or _role(asked[0]) == "system"):
            return [*asked, *turns[len(asked) - skipped :]], responses
    if asked and _role(asked[-1]) == _role(turns[0]) == "user":
        raise error(
            "different conversations",
            "a prompt that ends with the user's message, and sides that begin with another one",
            "begin the sides with the whole prompt, or with what comes after it",
            "chosen",
        )
    return [*asked, *turns], responses


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of messages say the same: blanks and keys that are null aside."""
    return len(a) == len(b) and all(_essence(x) == _essence(y) for x, y in zip(a, b, strict=True))


def _essence(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _essence(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_essence(item) for item in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def score_names(value: dict[str, Any]) -> set[str]:
    scores = value.get("chosen_scores")
    names = set(scores) if isinstance(scores, dict) else set()
    for column in value:
        for affix, name in ((column.endswith("_chosen"), column[:-7]), (column.startswith("chosen_"), column[7:])):
            if affix and name != "scores":
                names.add(name)
    return names

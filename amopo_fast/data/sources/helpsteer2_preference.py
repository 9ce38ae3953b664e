"""HelpSteer2-Preference (nvidia/HelpSteer2, data_dir=preference): which of two responses is better, and by how much.

    {"split": "train"|"validation", "prompt": str, "response_1": str, "response_2": str,
     "preference_strength": int from -3 (response 1 is much better) to 3, "preference_statement": str, ...}

The records hold no attributes; HelpSteer2's own records do, by prompt and response (`Source.scores`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from amopo_fast.data.sources import helpsteer2
from amopo_fast.data.sources.amopo_json import as_object
from amopo_fast.data.sources.candidate import MISSING, NO_OBJECT, Candidate, Dropped, RawRecord, extras_of
from amopo_fast.data.sources.raw import raw_records
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown

NAME = "helpsteer2_preference"
READS = ("scores", "split")
SCORE_RANGE = helpsteer2.SCORE_RANGE


def recognizes(value: dict[str, Any]) -> bool:
    return "preference_strength" in value and "response_1" in value


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    """The preferred response is the chosen one; equal ones are dropped."""
    attributes = _attributes(source) if any(name != NO_OBJECT for name in dimensions) else {}
    for raw in raws:
        if isinstance(raw, DataError):
            yield raw
            continue
        try:
            yield from _candidate(raw, source, dimensions, attributes)
        except DataError as error:
            yield error


def _candidate(
    raw: RawRecord, source: Source, dimensions: Sequence[str], attributes: dict[tuple[str, str], dict[str, Any]]
) -> Iterator[Candidate | Dropped]:
    value = as_object(raw, str(source), "write an object with prompt, response_1, response_2 and preference_strength")
    if source.split and value.get("split", source.split) != source.split:
        return
    strength = value.get("preference_strength", MISSING)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not -3 <= strength <= 3:
        raise DataError(
            "missing field" if strength is MISSING else "wrong type",
            shown(strength),
            "write a whole number from -3 (response 1 is much better) to 3 (response 2 is much better)",
            source=str(source),
            record=raw.record,
            line=raw.line,
            field="preference_strength",
        )
    if strength == 0:
        yield Dropped(raw.record, "a tie in preference_strength")
        return
    chosen, rejected = ("response_2", "response_1") if strength > 0 else ("response_1", "response_2")
    prompt = value.get("prompt", MISSING)
    scores = [_scores(attributes, prompt, value.get(side)) for side in (chosen, rejected)]
    yield Candidate(
        record=raw.record,
        line=raw.line,
        prompt=helpsteer2.conversation(prompt),
        chosen=value.get(chosen, MISSING),
        rejected=value.get(rejected, MISSING),
        chosen_scores={name: scores[0][name] for name in dimensions if name in scores[0]},
        rejected_scores={name: scores[1][name] for name in dimensions if name in scores[1]},
        names={"chosen": chosen, "rejected": rejected},
        extras=extras_of(value),
    )


def _scores(attributes: dict[tuple[str, str], dict[str, Any]], prompt: Any, response: Any) -> dict[str, Any]:
    if not isinstance(prompt, str) or not isinstance(response, str):
        return {}
    return attributes.get((prompt, response), {})


def _attributes(source: Source) -> dict[tuple[str, str], dict[str, Any]]:
    """Attributes by (prompt, response), of HelpSteer2's own records."""
    if source.scores:
        paths = [Source(path) for path in source.scores.split(";")]
    elif source.is_file:
        raise DataError(
            "no scores",
            "records of preferences, which hold no attributes",
            "name HelpSteer2's own files with the source's scores (train.jsonl.gz;validation.jsonl.gz), or train on "
            f"{NO_OBJECT} alone",
            source=str(source),
        )
    else:
        splits = [source.split] if source.split else ["train", "validation"]
        paths = [replace(Source(source.path), split=split) for split in splits]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for raw in raw_records(path):
            if isinstance(raw, DataError):
                raise raw
            if isinstance(raw.value, dict) and helpsteer2.recognizes(raw.value):
                value = raw.value
                found[(value["prompt"], value["response"])] = {
                    name: value[name] for name in helpsteer2.ATTRIBUTES if name in value
                }
    return found


def score_names(value: dict[str, Any]) -> set[str]:
    return set(helpsteer2.ATTRIBUTES)

"""HelpSteer2 (nvidia/HelpSteer2): one scored response a record, the two responses to a prompt one after the other.

    {"prompt": str, "response": str, "helpfulness": int, "correctness": int, "coherence": int, "complexity": int,
     "verbosity": int}                                                                  scores from 0 to 4

Turns of a longer conversation are marked in the prompt by <extra_id_1>User and <extra_id_1>Assistant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from amopo_fast.data.sources.amopo_json import as_object
from amopo_fast.data.sources.candidate import MISSING, Candidate, Dropped, RawRecord, extras_of
from amopo_fast.data.sources.ranking import rank, ranked_pairs
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError

NAME = "helpsteer2"
READS = ("rank_by",)
SCORE_RANGE = (0.0, 4.0)
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")


def recognizes(value: dict[str, Any]) -> bool:
    return "response" in value and "prompt" in value and any(name in value for name in ATTRIBUTES)


def conversation(prompt: Any) -> Any:
    """The prompt as messages where it marks turns; anything else as it is."""
    if not isinstance(prompt, str) or not _TURN.search(prompt):
        return prompt
    first, *rest = _TURN.split(prompt)
    messages = [{"role": "user", "content": first.strip()}] if first.strip() else []
    for role, text in zip(rest[::2], rest[1::2], strict=True):
        messages.append({"role": role.lower(), "content": text.strip()})
    return messages


def candidates(
    raws: Iterator[RawRecord | DataError], source: Source, dimensions: Sequence[str]
) -> Iterator[Candidate | Dropped | DataError]:
    """Pairs of neighbouring responses to one prompt, ranked by helpfulness unless the source says otherwise.

    The pair's record is the first response's.
    """
    for _, group in groupby(raws, key=lambda raw: _prompt(raw)):
        responses: list[RawRecord] = []
        for raw in group:
            if isinstance(raw, DataError):
                yield raw
                continue
            try:
                as_object(raw, str(source), "write an object with the keys prompt, response and one per attribute")
            except DataError as error:
                yield error
                continue
            responses.append(raw)
        for first in range(0, len(responses), 2):
            yield _pair(responses[first : first + 2], source, dimensions)


def _prompt(raw: RawRecord | DataError) -> Any:
    return raw.value.get("prompt") if isinstance(raw, RawRecord) and isinstance(raw.value, dict) else None


def _pair(responses: list[RawRecord], source: Source, dimensions: Sequence[str]) -> Candidate | Dropped | DataError:
    by = source.rank_by or "helpfulness"
    first = responses[0]
    if len(responses) < 2:
        return Dropped(first.record, "a prompt with one response")
    ranks = [rank(raw.value, by, dimensions) for raw in responses]
    for raw, value in zip(responses, ranks, strict=True):
        if value is None:
            return DataError(
                "missing field",
                "nothing to rank the response by",
                "add the score, or name another with the source's rank_by",
                source=str(source),
                record=raw.record,
                line=raw.line,
                field=by,
            )
    for better, worse in ranked_pairs(ranks, "best_worst"):
        chosen, rejected = responses[better].value, responses[worse].value
        return Candidate(
            record=first.record,
            line=first.line,
            prompt=conversation(chosen.get("prompt", MISSING)),
            chosen=chosen.get("response", MISSING),
            rejected=rejected.get("response", MISSING),
            chosen_scores={name: chosen[name] for name in dimensions if name in chosen},
            rejected_scores={name: rejected[name] for name in dimensions if name in rejected},
            names={
                "chosen": "response",
                "rejected": "response",
                **{f"{side}.{name}": name for side in ("chosen", "rejected") for name in dimensions},
            },
            records={
                "chosen": (responses[better].record, responses[better].line),
                "rejected": (responses[worse].record, responses[worse].line),
            },
            extras=extras_of(chosen),
        )
    return Dropped(first.record, f"a tie in {by}")


def score_names(value: dict[str, Any]) -> set[str]:
    return {name for name in ATTRIBUTES if name in value}

"""What a format module makes of a raw record: the parts of a pair, found but not yet validated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amopo_fast.errors import DataError

NO_OBJECT = "no_object"  # the dimension whose instruction names all the others and no score


class RawRecord(NamedTuple):
    record: int  # number in the source, from 0
    line: int | None  # line of the file, from 1, where records are lines
    value: Any  # whatever the file holds there


class Dropped(NamedTuple):
    """A record without a preference in it (a tie, a single response): no mistake of the file, and no pair."""

    record: int
    reason: str


class Missing:
    """Stands for a part that the record does not have, which is something else than a null."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()

# Keys beside prompt and responses that any format's record may have.
EXTRAS = ("system", "history", "tools", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")


def extras_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of its conversation beside the prompt."""
    return {name: value[name] for name in EXTRAS if value.get(name) is not None}


@dataclass(frozen=True)
class Candidate:
    """Parts of one pair as the source holds them; `data.pairs.make_pair` validates every one of them.

    `prompt` is a string or a list of {"role", "content"}, a response a string or the assistant's message; the scores
    are by dimension, of any type. `part` tells apart the pairs that one record holds, `extras` is what `extras_of`
    finds in it. Errors name the place that the user sees: `names` says how the source spells a part ("chosen" ->
    "chosen.response") or its beginning ("prompt" -> "conversations"), `records` where a side's own record and line are.
    """

    record: int
    prompt: Any
    chosen: Any
    rejected: Any
    chosen_scores: Mapping[str, Any]
    rejected_scores: Mapping[str, Any]
    line: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    part: int = 0
    extras: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    def place(self, part: str) -> tuple[int, int | None, str]:
        """(record, line, the source's name) of a part."""
        side = part.partition(".")[0]
        record, line = self.records.get(side, (self.record, self.line))
        if part in self.names:
            return record, line, self.names[part]
        name = part
        # A side's name is that of its text; what else it holds has names of its own.
        for beginning in sorted(self.names.keys() - {"chosen", "rejected"}, key=len, reverse=True):
            if part.startswith((f"{beginning}[", f"{beginning}.")):
                name = self.names[beginning] + part[len(beginning) :]
                break
        before, dot, last = name.rpartition(".")
        return record, line, before + dot + self.names.get(f".{last}", last)


def one_a_record(
    raws: Iterator[RawRecord | DataError], make: Callable[[RawRecord], Candidate]
) -> Iterator[Candidate | DataError]:
    """What `make` makes of each record; a DataError stands in the place of a record that is bad."""
    for raw in raws:
        try:
            yield raw if isinstance(raw, DataError) else make(raw)
        except DataError as error:
            yield error

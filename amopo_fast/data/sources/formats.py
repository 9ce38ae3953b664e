"""The formats that pairs come in, and which of them a source has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType

from amopo_fast.data.sources import amopo_json, helpsteer2, helpsteer2_preference, sharegpt, trl, ultrafeedback
from amopo_fast.data.sources.candidate import Candidate, Dropped, RawRecord
from amopo_fast.data.sources.raw import raw_records
from amopo_fast.data.sources.spec import Source, did_you_mean
from amopo_fast.errors import DataError, OptionError

# In the order in which a first record is tried. Each module has NAME, SCORE_RANGE, READS (the options
# of a source that only some formats read), recognizes, candidates, score_names.
FORMATS = {
    module.NAME: module for module in (sharegpt, amopo_json, ultrafeedback, helpsteer2_preference, helpsteer2, trl)
}
# Formats of other methods, by the keys of a record: what they are, and what a pair would need.
_OTHERS = (
    ({"completion", "label"}, "single answers with a label (KTO)", "pair a good with a bad answer to each prompt"),
    ({"conversations"}, "conversations without a preference (ShareGPT)", "add chosen and rejected to each"),
    ({"messages"}, "conversations without a preference", "add chosen and rejected to each"),
    ({"instruction", "output"}, "single answers (Alpaca)", "give each instruction a chosen and a rejected answer"),
    ({"prompt", "completion"}, "single answers", "give each prompt a chosen and a rejected answer"),
)
_LOOKED_AT = 100  # records that may be bad before the format is told


@dataclass
class OpenSource:
    """A source whose format is known; `records` can be read once."""

    source: Source
    format: ModuleType
    records: Iterator[RawRecord | DataError]
    score_names: set[str]  # of the records read so far, for messages

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The source's own range of scores, None where neither it nor its format names one."""
        if self.source.score_min is not None:
            return self.source.score_min, self.source.score_max
        return self.format.SCORE_RANGE

    def candidates(self, dimensions: Sequence[str]) -> Iterator[Candidate | Dropped | DataError]:
        return self.format.candidates(self._noting_scores(), self.source, dimensions)

    def _noting_scores(self) -> Iterator[RawRecord | DataError]:
        for raw in self.records:
            if isinstance(raw, RawRecord) and isinstance(raw.value, dict):
                self.score_names |= self.format.score_names(raw.value)
            yield raw


def open_source(source: Source) -> OpenSource:
    """Opens a source and tells its format by its first records, unless the source names it.

    Raises:
        DataError: the source cannot be read. ValueError: it names a format that there is not.
        OptionError: it has an option that nothing reads.
    """
    records = raw_records(source)
    head = []
    chosen = None
    if source.format != "auto":
        chosen = FORMATS.get(source.format)
        if chosen is None:
            raise ValueError(f"{source.path}: unknown format {source.format!r}{did_you_mean(source.format, FORMATS)}")
    while chosen is None and len(head) < _LOOKED_AT:
        raw = next(records, None)
        if raw is None:
            break
        head.append(raw)
        if isinstance(raw, RawRecord) and isinstance(raw.value, dict):
            chosen = next((module for module in FORMATS.values() if module.recognizes(raw.value)), None)
    first = next((raw.value for raw in head if isinstance(raw, RawRecord) and isinstance(raw.value, dict)), {})
    if chosen in (None, trl) and {"instruction", "chosen", "rejected"} <= first.keys() and "prompt" not in first:
        raise DataError("unknown format", "records with instruction, chosen and rejected (Alpaca's preferences)",
                        "rename instruction, with its input behind it, to prompt", source=str(source))  # fmt: skip
    if chosen is None and head:
        # Nothing fits. With the keys of some format at least in part, that format's own errors say more.
        keys = {key for raw in head if isinstance(raw, RawRecord) and isinstance(raw.value, dict) for key in raw.value}
        if not keys & {"chosen", "rejected"}:
            for own, what, remedy in _OTHERS:
                if own <= keys:
                    found = f"records that are {what}"
                    remedy += ", with a score per dimension (docs/data.md)"
                    raise DataError("unknown format", found, remedy, source=str(source))
        if keys and not keys & {"prompt", "chosen", "rejected"}:
            raise DataError(
                "unknown format",
                f"records with the keys {', '.join(sorted(map(str, keys))[:12])}",
                f"rename them to one of the formats {', '.join(FORMATS)} (docs/data.md), or name the source's format",
                source=str(source),
            )
    _refuse_unread(source, chosen or amopo_json)
    return OpenSource(source, chosen or amopo_json, chain(head, records), set())


def _refuse_unread(source: Source, format: ModuleType) -> None:
    unread = {"rank_by", "scores", *(("pairs",) if source.pairs != Source.pairs else ())}
    if source.is_file:
        unread |= {"split", "subset", "data_dir"}
    for option in sorted(unread - set(format.READS)):
        if value := getattr(source, option):
            what = "a file" if option in ("subset", "data_dir") else f"a file of the format {format.NAME}"
            raise OptionError(f"{source.path}: {option}={value} has no effect on {what}: leave it out")

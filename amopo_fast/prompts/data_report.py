"""What `validate` reports of a data file and of a run's data: numbers, as JSON or for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.text import Text

from amopo_fast.report.tables import NumbersTable

PERCENTILES = (50, 90, 95, 99)

_BINS = 12
_SCORE_COLUMNS = 11  # different scores that are counted one by one
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Distribution:
    """Lengths of one part of the pairs. `edges` has one element more than `counts`."""

    mean: float
    min: int
    max: int
    percentiles: dict[int, float]
    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Sequence[int]) -> Distribution:
        counts, edges = np.histogram(values, bins=_BINS)
        return cls(
            mean=float(np.mean(values)),
            min=int(np.min(values)),
            max=int(np.max(values)),
            percentiles={share: float(np.percentile(values, share)) for share in PERCENTILES},
            edges=edges.tolist(),
            counts=counts.tolist(),
        )


@dataclass(frozen=True)
class DimensionReport:
    """Scores of one dimension: how often each occurs, and how the two sides compare where both have one."""

    chosen: dict[float, int]
    rejected: dict[float, int]
    chosen_higher: int
    ties: int
    reversals: int  # the rejected side scores higher
    absent: int  # pairs without a chosen score, where the dimension takes no part


@dataclass(frozen=True)
class ValidationReport:
    """What `validate_file` found. `ok` is whether every record can be used.

    `unit` is what `lengths` counts: "tokens" as the model would see them before any shortening, or "words" where no
    tokenizer was given. Its keys: "prompt" (the longest of the dimensions'), "chosen", "rejected", "sequence".
    """

    source: str
    records: int
    pairs: int
    bad_by_kind: dict[str, int]
    errors: list[str]  # the first ones
    format: str = ""  # one of sources.formats.FORMATS
    dropped: dict[str, int] = field(default_factory=dict)  # records without a preference, by reason
    dimensions: dict[str, DimensionReport] = field(default_factory=dict)
    repeated_prompts: int = 0  # pairs whose prompt an earlier pair has
    repeated_pairs: int = 0  # pairs that an earlier pair equals in prompt and responses
    contradictions: int = 0  # pairs whose responses an earlier pair has the other way round
    unit: Literal["tokens", "words"] = "words"
    lengths: dict[str, Distribution] = field(default_factory=dict)
    max_length: int | None = None
    truncated: int | None = None  # pairs longer than max_length, which training would shorten
    notes: dict[str, int] = field(default_factory=dict)  # pairs by what is done to them (PromptBuilder.notes)

    @property
    def ok(self) -> bool:
        return not self.bad_by_kind

    def to_json(self) -> str:
        content: dict[str, Any] = {"ok": self.ok, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kind = f" (format {self.format})" if self.format else ""
        yield Text.assemble((self.source, "bold"), f"{kind}: {self.records} records, {self.pairs} usable pairs")
        for reason, count in self.dropped.items():
            yield Text(f"{count} records dropped: {reason}", "yellow")
        if self.pairs:
            if self.dimensions:
                yield self._scores()
                yield self._preferences()
            yield self._lengths()
            if self.truncated is not None:
                yield Text(f"{self.truncated} of {self.pairs} pairs are longer than {self.max_length} tokens", "yellow")
            for note, count in self.notes.items():
                yield Text(f"{count} pairs: {note}", "yellow")
            yield Text(
                f"{self.repeated_prompts} repeated prompts, {self.repeated_pairs} repeated pairs, "
                f"{self.contradictions} pairs that contradict an earlier one"
            )
        if self.ok:
            yield Text("no bad records", "green")
            return
        kinds = [[kind, str(count)] for kind, count in self.bad_by_kind.items()]
        yield NumbersTable("Bad records by kind", ["kind", "records"], kinds)
        for message in self.errors:
            yield Text(message, "red")
        rest = sum(self.bad_by_kind.values()) - len(self.errors)
        if rest:
            yield Text(f"and {rest} more", "red")

    def _scores(self) -> NumbersTable:
        values = sorted({score for d in self.dimensions.values() for score in (*d.chosen, *d.rejected)})
        rows = []
        for name, d in self.dimensions.items():
            for side, scores in (("chosen", d.chosen), ("rejected", d.rejected)):
                if len(values) <= _SCORE_COLUMNS:
                    cells = [str(scores.get(value, "")) for value in values]
                else:
                    cells = [_span(scores)]
                rows.append([name if side == "chosen" else "", side, *cells])
        columns = [f"{value:g}" for value in values] if len(values) <= _SCORE_COLUMNS else ["scores"]
        return NumbersTable("Pairs by score", ["dimension", "side", *columns], rows, keys=2)

    def _preferences(self) -> NumbersTable:
        rows = [
            [name, *(str(count) for count in (d.chosen_higher, d.ties, d.reversals, d.absent))]
            for name, d in self.dimensions.items()
        ]
        columns = ["dimension", "chosen higher", "ties", "reversals", "absent"]
        return NumbersTable("Pairs by preference", columns, rows)

    def _lengths(self) -> NumbersTable:
        rows = []
        for name, d in self.lengths.items():
            top = max(d.counts)
            bars = "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in d.counts)
            numbers = [d.min, *d.percentiles.values(), d.max, d.mean]
            rows.append([name, *(f"{number:.0f}" for number in numbers), bars])
        columns = ["part", "min", *(f"p{share}" for share in PERCENTILES), "max", "mean", "min to max"]
        return NumbersTable(f"Lengths in {self.unit}", columns, rows)


@dataclass(frozen=True)
class DataReport:
    """The reports of all sources of a configuration. `shared_prompts` are in training and evaluation data alike."""

    training: list[ValidationReport]
    evaluation: list[ValidationReport]
    shared_prompts: int
    errors: list[str] = field(default_factory=list)  # of the configuration as a whole

    @property
    def ok(self) -> bool:
        return not self.errors and all(report.ok for report in (*self.training, *self.evaluation))

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **dataclasses.asdict(self)}, indent=2, ensure_ascii=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for title, reports in (("Training data", self.training), ("Evaluation data", self.evaluation)):
            for report in reports:
                if self.evaluation or len(self.training) > 1:
                    yield Rule(title, style="dim")
                yield report
        for error in self.errors:
            yield Text(error, "red")
        if self.evaluation:
            style = "yellow" if self.shared_prompts else "green"
            yield Text(f"{self.shared_prompts} prompts are in both training and evaluation data", style)


def _span(scores: dict[float, int]) -> str:
    return f"{len(scores)} values from {min(scores):g} to {max(scores):g}" if scores else "none"

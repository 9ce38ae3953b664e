"""What a data file holds, before a run spends hours on it: a report of the file, and one record's sequences.

The library behind `amopo-fast validate` and `amopo-fast show`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.text import Text

from amopo_fast.data.pairs import (
    DEFAULT_SCORE_RANGE,
    NO_OBJECT,
    Pair,
    Reading,
    check_known,
    iter_records,
    no_usable_record,
)
from amopo_fast.data.sources.candidate import Dropped
from amopo_fast.data.sources.formats import OpenSource, open_source
from amopo_fast.data.sources.spec import Source, parse_sources
from amopo_fast.errors import DataError
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.tables import NumbersTable

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from amopo_fast.data.config import DataConfig

PERCENTILES = (50, 90, 95, 99)

_BINS = 12
_SCORE_COLUMNS = 11  # different scores that are counted one by one
_LISTED_ERRORS = 20  # as many as a person reads; the counts by kind are complete
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


def validate_data(config: DataConfig, tokenizer=None) -> DataReport:
    """Reads all data of a configuration and reports on it; with a tokenizer also on tokens.

    Raises ValueError for options that make no sense.
    """
    from amopo_fast.prompts.dataset import common_score_range, prompt_builder

    sources = parse_sources(config.train_data), parse_sources(config.eval_data)
    opened, failed = [], {}
    for source in (*sources[0], *sources[1]):
        try:
            opened.append(open_source(source))
        except DataError as error:
            failed[source] = _failed(source, error)
    errors = []
    score_range = DEFAULT_SCORE_RANGE
    if opened:
        try:
            score_range = common_score_range(config, opened)
        except ValueError as error:
            errors.append(str(error))
    reading = Reading(config.dimensions, score_range, config.missing_scores, config.tied_dimensions)
    builder = None
    if tokenizer is not None:
        builder = prompt_builder(config, tokenizer, score_range)
    by_source = {each.source: each for each in opened}
    prompts: list[set[tuple]] = [set(), set()]
    reports: list[list[ValidationReport]] = [[], []]
    several = len(sources[0]) + len(sources[1]) > 1
    for side, own in enumerate(sources):
        for source in own:
            report = failed.get(source) or _validate(by_source[source], reading, builder, prompts[side], several)
            reports[side].append(report)
    try:
        if opened and several and not failed:
            known = set().union(*(each.score_names for each in opened))
            check_known(reading, known, ", ".join(str(each.source) for each in opened))
    except DataError as error:
        errors.append(str(error))
    return DataReport(reports[0], reports[1], len(prompts[0] & prompts[1]), errors)


def validate_file(
    path: str | Path | Source,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = DEFAULT_SCORE_RANGE,
    missing_scores: Literal["error", "absent"] = "error",
    tied_dimensions: Literal["keep", "drop"] = "keep",
    builder: PromptBuilder | None = None,
) -> ValidationReport:
    """Reads a whole source and reports on it; with a builder also on tokens, and on pairs that cannot be tokenised.

    Nothing in the source raises: what is wrong, with the source as a whole too, is in the report.

    Raises ValueError for arguments that make no sense.
    """
    source = Source.parse(path)
    reading = Reading(dimensions, score_range, missing_scores, tied_dimensions)
    try:
        opened = open_source(source)
    except DataError as error:
        return _failed(source, error)
    return _validate(opened, reading, builder, set())


def _failed(source: Source, error: DataError) -> ValidationReport:
    return ValidationReport(str(source), 0, 0, {error.kind: 1}, [str(error)])


def _validate(
    opened: OpenSource,
    reading: Reading,
    builder: PromptBuilder | None,
    prompts: set[tuple],
    one_of_several: bool = False,
) -> ValidationReport:
    """Adds the source's prompts to `prompts`."""
    pairs: list[Pair] = []
    errors: list[DataError] = []
    dropped: Counter[str] = Counter()
    seen: set[int] = set()
    try:
        for item in iter_records(opened, reading, one_of_several=one_of_several):
            if isinstance(item, Pair):
                pairs.append(item)
            elif isinstance(item, DataError):
                errors.append(item)
            else:
                dropped[item.reason] += 1
            seen.add(-1 if item.record is None else item.record)
    except DataError as error:
        errors.append(error)
    if not pairs and not errors:
        errors.append(no_usable_record(str(opened.source), [], dropped))
    prompts |= {pair.prompt for pair in pairs}
    lengths, truncated, max_length = None, None, None
    notes: Counter[str] = Counter()
    if builder is not None:
        pairs, lengths, unusable = _token_lengths(pairs, builder, dropped, notes)
        errors = sorted([*errors, *unusable], key=lambda error: -1 if error.record is None else error.record)
        max_length = builder.max_length
        truncated = sum(length > max_length for length in lengths["sequence"])
    elif pairs:
        lengths = _word_lengths(pairs)
    repeated_prompts, repeated_pairs, contradictions = _repetitions(pairs)
    return ValidationReport(
        source=str(opened.source),
        records=len(seen - {-1}),
        pairs=len(pairs),
        bad_by_kind=dict(Counter(error.kind for error in errors).most_common()),
        errors=[str(error) for error in errors[:_LISTED_ERRORS]],
        format=opened.format.NAME,
        dropped=dict(dropped),
        dimensions={name: _dimension(pairs, name) for name in reading.dimensions if name != NO_OBJECT},
        repeated_prompts=repeated_prompts,
        repeated_pairs=repeated_pairs,
        contradictions=contradictions,
        unit="words" if builder is None else "tokens",
        lengths={name: Distribution.of(values) for name, values in lengths.items()} if pairs else {},
        max_length=max_length,
        truncated=truncated,
        notes=dict(notes),
    )


def _token_lengths(
    pairs: Sequence[Pair], builder: PromptBuilder, dropped: Counter[str], notes: Counter[str]
) -> tuple[list[Pair], dict[str, list[int]], list[DataError]]:
    """The pairs that can be used, their lengths, and the others' errors; counts what is left out and what is done."""
    usable, errors = [], []
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "sequence": []}
    for pair, found in zip(pairs, builder.iter_lengths(pairs), strict=True):
        if isinstance(found, DataError):
            errors.append(found)
            continue
        sequence = found[0] + max(found[1:])
        if sequence > builder.max_length:
            shortened = next(builder.iter_tokens([pair]))  # whether it still can be used
            if isinstance(shortened, DataError):
                errors.append(shortened)
                continue
            if isinstance(shortened, Dropped):
                dropped[shortened.reason] += 1
                continue
        usable.append(pair)
        notes.update(builder.notes(pair))
        for values, number in zip(lengths.values(), (*found, sequence), strict=True):
            values.append(number)
    return usable, lengths, errors


def _word_lengths(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    prompt = [sum(len(message.content.split()) for message in pair.messages) for pair in pairs]
    chosen = [len(pair.chosen.split()) for pair in pairs]
    rejected = [len(pair.rejected.split()) for pair in pairs]
    sequence = [words + max(sides) for words, *sides in zip(prompt, chosen, rejected, strict=True)]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "sequence": sequence}


def _dimension(pairs: Sequence[Pair], name: str) -> DimensionReport:
    chosen = [pair.chosen_scores.get(name) for pair in pairs]
    rejected = [pair.rejected_scores.get(name) for pair in pairs]
    both = [(w, r) for w, r in zip(chosen, rejected, strict=True) if w is not None and r is not None]
    return DimensionReport(
        chosen=_sorted_counts(chosen),
        rejected=_sorted_counts(rejected),
        chosen_higher=sum(w > r for w, r in both),
        ties=sum(w == r for w, r in both),
        reversals=sum(w < r for w, r in both),
        absent=sum(score is None for score in chosen),
    )


def _sorted_counts(scores: Sequence[float | None]) -> dict[float, int]:
    return dict(sorted(Counter(score for score in scores if score is not None).items()))


def _repetitions(pairs: Sequence[Pair]) -> tuple[int, int, int]:
    prompts, whole = set(), set()
    repeated_prompts = repeated_pairs = contradictions = 0
    for pair in pairs:
        chosen, rejected = (pair.chosen, pair.chosen_fields), (pair.rejected, pair.rejected_fields)
        repeated_prompts += pair.prompt in prompts
        repeated_pairs += (pair.prompt, chosen, rejected) in whole
        contradictions += (pair.prompt, rejected, chosen) in whole
        prompts.add(pair.prompt)
        whole.add((pair.prompt, chosen, rejected))
    return repeated_prompts, repeated_pairs, contradictions


def _span(scores: dict[float, int]) -> str:
    return f"{len(scores)} values from {min(scores):g} to {max(scores):g}" if scores else "none"

"""What a data file holds, before a run spends hours on it: a report of the file, and one record's sequences.

The library behind `amopo-fast validate` and `amopo-fast show`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from amopo_fast.prompts.data_report import DataReport, DimensionReport, Distribution, ValidationReport
from amopo_fast.prompts.wording import Wording

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from amopo_fast.data.config import DataConfig

_LISTED_ERRORS = 20  # as many as a person reads; the counts by kind are complete


def validate_data(config: DataConfig, tokenizer=None, *, wording: Wording | None = None) -> DataReport:
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
        builder = prompt_builder(config, tokenizer, score_range, wording)
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

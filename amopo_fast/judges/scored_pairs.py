"""From pairs without scores to pairs that this trainer uses: a judge's scores of both responses, in TRL's format.

    source -> Pair -> Answer, Answer -> Judge -> OUTPUT.partial, a line a pair -> OUTPUT, whole or not there

A restart reads the source again, checks that it is the same, and asks the judge for the rest alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from amopo_fast.data.pair import Pair
from amopo_fast.data.pairs import Reading, iter_records, no_usable_record
from amopo_fast.data.sources.candidate import NO_OBJECT, Dropped
from amopo_fast.data.sources.formats import open_source
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, JudgeError, OptionError
from amopo_fast.judges.judge import Judge, as_answer, nothing
from amopo_fast.survival import durable
from amopo_fast.survival.work_file import WorkFile

CHUNK = 64  # pairs that are judged together, and written together
TAILS = (1.0, 99.0)  # percentiles of a judge's own scale that become the ends of the range

Scores = dict[str, float]


@dataclass
class Scored:
    """What was written: how a dimension's scores of chosen and rejected compare, and how many pairs lack one."""

    pairs: int = 0
    skipped: int = 0  # bad records
    dropped: int = 0  # records without a preference
    higher: dict[str, int] = field(default_factory=dict)
    tied: dict[str, int] = field(default_factory=dict)
    lower: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, chosen: float | None, rejected: float | None) -> None:
        if chosen is None or rejected is None:
            kind = self.missing
        else:
            kind = self.higher if chosen > rejected else self.lower if chosen < rejected else self.tied
        kind[name] = kind.get(name, 0) + 1


@dataclass(frozen=True)
class PairFile:
    """A source of pairs that may have no scores, read as often as it is needed.

    Attributes:
        keep: dimensions whose scores in the source are carried over. score_range: which they are mapped to.
        skip_bad: leave bad records out instead of raising the first one's error.
    """

    source: Source
    keep: tuple[str, ...] = ()
    score_range: tuple[float, float] = (0.0, 5.0)
    skip_bad: bool = False

    def read(self, counts: Scored | None = None) -> Iterator[Pair]:
        """Raises DataError for a source that cannot be read, has no pairs or, unless `skip_bad`, a bad record."""
        reading = Reading((NO_OBJECT, *self.keep), self.score_range, missing_scores="absent")
        found, errors, dropped = 0, [], {}
        for item in iter_records(open_source(self.source), reading):
            if isinstance(item, Pair):
                found += 1
                yield item
            elif isinstance(item, Dropped):
                dropped[item.reason] = dropped.get(item.reason, 0) + 1
            elif self.skip_bad:
                errors.append(item)
            else:
                raise item
        if counts is not None:
            counts.skipped, counts.dropped = len(errors), sum(dropped.values())
        if not found:
            raise no_usable_record(str(self.source), errors, dropped)


def score_pairs(
    file: PairFile,
    judge: Judge,
    dimensions: Sequence[str],
    output: str | Path,
    *,
    rescale: float | None = None,
    total: int,
    done: Callable[[int], None] = nothing,
) -> Scored:
    """Writes the pairs with the judge's scores of both responses.

    Args:
        output: a .jsonl file. What is done so far stands beside it under the name .partial.
        rescale: map the judge's own scale to `file.score_range` in steps of this size, from its 1st to its 99th
            percentile over all responses, each dimension by itself; None: its scores are in that range.
        total: pairs in the source. done: called with the number of scores that are there.

    Raises:
        OptionError: earlier work with other options or data stands beside the output.
        DataError: as `PairFile.read`. JudgeError: the judge cannot go on, or a score is out of range.
    """
    output = Path(output)
    identity = {"judge": judge.identity, "dimensions": list(dimensions), "keep": list(file.keep),
                "score_range": list(file.score_range), "on_bad_record": "skip" if file.skip_bad else "error",
                "source": str(file.source), "pairs": total}  # fmt: skip
    with WorkFile(output.with_name(output.name + ".partial"), identity) as work:
        pairs = file.read()
        for line in work.lines:
            pair = next(pairs, None)
            if pair is None or digest(pair) != line["pair"]:
                raise OptionError(f"{file.source} is not the data that {work.path} was begun with: restore it, or "
                                  "delete that file to begin again", "data")  # fmt: skip
            done(2 * len(dimensions))
        while chunk := list(islice(pairs, CHUNK)):
            answers = [as_answer(pair.messages, text) for pair in chunk for text in (pair.chosen, pair.rejected)]
            table = judge.scores(answers, dimensions, done)
            if rescale is None:
                _check_range(table, dimensions, file.score_range)
            work.append(
                {"pair": digest(pair), "scores": [[_or_none(x) for x in row] for row in rows]}
                for pair, rows in zip(chunk, table.reshape(len(chunk), 2, -1).tolist(), strict=True)
            )
        table = np.array([line["scores"] for line in work.lines], dtype=np.float64)  # (P, 2, D), null as NaN
        if rescale is not None:
            table = rescaled(table, dimensions, file.score_range, rescale)
        by_pair = ([dict(zip(dimensions, side, strict=True)) for side in pair] for pair in table.tolist())
        found = _write(file, output, by_pair)
        work.remove()
        return found


def score_preferences(file: PairFile, dimension: str, output: str | Path) -> Scored:
    """Writes the pairs with the highest score for the chosen response and the lowest for the rejected one, which is
    all that a preference says. Raises DataError as `PairFile.read`."""
    low, high = file.score_range

    def scores():
        while True:
            yield [{dimension: high}, {dimension: low}]

    return _write(file, Path(output), scores())


def rescaled(
    table: np.ndarray, dimensions: Sequence[str], score_range: tuple[float, float], step: float
) -> np.ndarray:
    """(P, 2, D) scores of a judge's own scale, mapped linearly to the range and rounded to its steps.

    Raises JudgeError for a dimension in which all scores are the same.
    """
    low, high = score_range
    with np.errstate(invalid="ignore"):
        first, last = np.nanpercentile(table.reshape(-1, table.shape[-1]), TAILS, axis=0)
    for name, a, b in zip(dimensions, first, last, strict=True):
        if not b > a:
            raise JudgeError(f"the judge's scores of {name} are all {a:g}: there is nothing to learn from them; leave "
                             f"{name} out")  # fmt: skip
    share = np.clip((table - first) / (last - first), 0, 1)
    return np.clip(low + np.round(share * (high - low) / step) * step, low, high).round(4)


def digest(pair: Pair) -> str:
    """Equal for pairs of the same texts."""
    content = [pair.record, pair.part, [list(message) for message in pair.messages], pair.chosen, pair.rejected,
               pair.chosen_fields, pair.rejected_fields, pair.tools, pair.chat_template_kwargs]  # fmt: skip
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def record_of(pair: Pair, chosen: Mapping[str, float | None], rejected: Mapping[str, float | None]) -> dict[str, Any]:
    """A pair in TRL's format with its scores; a score that is None or NaN is left out."""
    messages = [message.as_dict() for message in pair.messages]
    plain = len(messages) == 1 and not (pair.messages[0].fields or pair.chosen_fields or pair.rejected_fields)
    record: dict[str, Any] = {"prompt": messages[0]["content"] if plain else messages}
    for side, text, fields in (
        ("chosen", pair.chosen, pair.chosen_fields),
        ("rejected", pair.rejected, pair.rejected_fields),
    ):
        message = {"role": "assistant", "content": text, **json.loads(fields or "{}")}
        record[side] = text if plain else [message]
    for name, text in (("tools", pair.tools), ("chat_template_kwargs", pair.chat_template_kwargs)):
        if text:
            record[name] = json.loads(text)
    record["chosen_scores"] = {name: x for name, x in chosen.items() if _or_none(x) is not None}
    record["rejected_scores"] = {name: x for name, x in rejected.items() if _or_none(x) is not None}
    return record


def _write(file: PairFile, output: Path, scores) -> Scored:
    """Scores of each pair, as they come, beside those that the source has."""
    counts = Scored()
    partial = output.with_name(f".{output.name}.tmp")
    with partial.open("w", encoding="utf-8") as out:
        for pair, (chosen, rejected) in zip(file.read(counts), scores, strict=False):
            counts.pairs += 1
            for name in chosen:
                counts.count(name, _or_none(chosen[name]), _or_none(rejected[name]))
            record = record_of(pair, {**pair.chosen_scores, **chosen}, {**pair.rejected_scores, **rejected})
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, output)
    durable.flush(output.absolute().parent)
    return counts


def _or_none(x: float | None) -> float | None:
    return None if x is None or math.isnan(x) else x


def _check_range(table: np.ndarray, dimensions: Sequence[str], score_range: tuple[float, float]) -> None:
    low, high = score_range
    for column, name in enumerate(dimensions):
        outside = table[:, column][(table[:, column] < low) | (table[:, column] > high)]
        if len(outside):
            raise JudgeError(
                f"the judge gave {outside[0]:g} for {name}, and scores go from {low:g} to {high:g}: set --score_min "
                "and --score_max to its range, or map its scale with --rescale 1"
            )


def count_pairs(file: PairFile) -> int:
    """How many pairs a source holds; reads it whole, so that a bad record is known before anything is paid."""
    return sum(1 for _ in file.read())


def score_names(source: Source) -> list[str]:
    """Dimensions for which the first records of a source hold numbers. Raises DataError if it cannot be read."""
    opened = open_source(source)
    for _ in islice(opened.candidates(()), 100):
        pass
    try:
        return sorted(opened.score_names)
    except TypeError as error:
        raise DataError("wrong type", str(error), "name scores by text", source=str(source)) from None

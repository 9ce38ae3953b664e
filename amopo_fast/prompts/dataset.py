"""From a DataConfig to tokenized pairs: several sources, weights, held-out prompts, sets larger than memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from amopo_fast.data.config import DataConfig
from amopo_fast.data.order import shuffled_order
from amopo_fast.data.pair import prompt_key, template_kwargs
from amopo_fast.data.pairs import (
    DEFAULT_SCORE_RANGE,
    PARTS,
    Pair,
    Reading,
    check_known,
    iter_records,
    no_usable_record,
    number_of,
)
from amopo_fast.data.sources.candidate import Dropped
from amopo_fast.data.sources.formats import OpenSource, open_source
from amopo_fast.data.sources.spec import Source, parse_sources
from amopo_fast.errors import DataError, OptionError
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.recipe import Recipe, recipe_of_prompts
from amopo_fast.prompts.store import TokenStore
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.prompts.wording import Wording

_BATCH = 64  # pairs tokenized together
_REPEAT = PARTS << 8  # keeps the numbers of a pair apart that an epoch takes more than once
_LISTED = 20  # skipped records that are printed


@dataclass
class Counts:
    """What became of one source's records."""

    pairs: int = 0
    held_out: int = 0
    truncated: int = 0
    skipped: Counter = field(default_factory=Counter)  # by kind of mistake
    dropped: Counter = field(default_factory=Counter)  # by reason
    examples: list[str] = field(default_factory=list)  # the first skipped records' errors

    def __str__(self) -> str:
        parts = [f"{self.pairs} pairs"]
        if self.held_out:
            parts.append(f"{self.held_out} held out for evaluation")
        if self.skipped:
            parts.append(f"{sum(self.skipped.values())} bad records skipped")
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        if self.truncated:
            parts.append(f"{self.truncated} shortened")
        return ", ".join(parts)


@dataclass(frozen=True)
class Data:
    """Tokenized pairs of a run. `evals` by name, "" for a single set without one; `counts` by source."""

    train: Sequence[PairTokens]
    evals: dict[str, Sequence[PairTokens]]
    counts: dict[str, Counts]
    score_range: tuple[float, float]
    recipe: Recipe
    shared_prompts: int = 0  # prompts of evaluation sets that training has too

    @property
    def eval_dataset(self) -> Sequence[PairTokens] | dict[str, Sequence[PairTokens]] | None:
        """As Trainer takes it: nothing, one set, or several by name."""
        if list(self.evals) == [""]:
            return self.evals[""]
        return self.evals or None


def load_data(
    config: DataConfig, tokenizer, *, seed: int, folder: str | Path | None = None, wording: Wording | None = None,
    asked: float | None = None,
) -> Data:  # fmt: skip
    """Reads, checks, tokenizes, mixes and splits the data of a run.

    Args:
        seed: decides which prompts are held out and which pairs a weight leaves out.
        folder: where token files go if `config.streaming`; one of its own for each process of a run.
        wording: of the instructions; default: the configuration's prompt_template.
        asked: the score that every instruction names in the place of the chosen response's.

    Raises:
        OptionError: no training data is named, or nothing is held out. ValueError: no pair is left.
        DataError: a source cannot be read or, unless bad records are skipped, has a bad one.
    """
    sources = parse_sources(config.train_data)
    if not sources:
        raise OptionError("train_data is missing: give --train_data FILE, or train_data in the YAML file")
    eval_sources = named_sources(parse_sources(config.eval_data))
    opened = [open_source(source) for source in [*sources, *eval_sources.values()]]
    score_range = common_score_range(config, opened)
    loader = _Loader(config, tokenizer, score_range, seed, folder, wording, asked, one_of_several=len(opened) > 1)
    parts, held_out = [], []
    for source in opened[: len(sources)]:
        train, evaluation = loader.load(source, config.eval_share)
        parts.append(_Part(train, source.source.weight, loader.last_record))
        held_out.append(_Part(evaluation, 1.0, loader.last_record))
    if not any(len(part.pairs) for part in parts):
        raise ValueError("no pair is left to train on")
    loader.check_known(opened[: len(sources)])
    evals: dict[str, Sequence[PairTokens]] = {}
    train_prompts = loader.prompts
    shared = 0
    if eval_sources:
        for name, source in zip(eval_sources, opened[len(sources) :], strict=True):
            loader.prompts = set()
            evals[name], _ = loader.load(source, 0.0)
            shared += len(loader.prompts & train_prompts)
    elif config.eval_share:
        evals = {"": Mixture(held_out, seed)}
        if not len(evals[""]):
            raise OptionError(f"eval_share={config.eval_share} holds out no prompt of this data; raise it", "eval_share")  # noqa: E501
    train = parts[0].pairs if len(parts) == 1 and parts[0].weight == 1 else Mixture(parts, seed)
    return Data(train, evals, loader.counts, score_range, loader.recipe(train), shared)


def load_eval_data(
    config: DataConfig, tokenizer, *, seed: int, folder: str | Path | None = None, wording: Wording | None = None,
    asked: float | None = None,
) -> Data:  # fmt: skip
    """The evaluation sets alone, by name ("" for a single one): those of eval_data, or what eval_share holds out.

    wording: of the instructions; default: the configuration's prompt_template. asked: as `load_data`.

    Raises as `load_data`.
    """
    if not config.eval_data:
        if not config.eval_share:
            raise OptionError("eval_data is missing: give --eval_data FILE, or --train_data with --eval_share")
        return replace(load_data(config, tokenizer, seed=seed, folder=folder, wording=wording, asked=asked),
                       train=[])  # fmt: skip
    opened = {name: open_source(source) for name, source in named_sources(parse_sources(config.eval_data)).items()}
    score_range = common_score_range(config, list(opened.values()))
    loader = _Loader(config, tokenizer, score_range, seed, folder, wording, asked, one_of_several=len(opened) > 1)
    evals = {name: loader.load(source, 0.0)[0] for name, source in opened.items()}
    loader.check_known(list(opened.values()))
    return Data([], evals, loader.counts, score_range, loader.recipe([]))


def common_score_range(config: DataConfig, opened: Sequence[OpenSource]) -> tuple[float, float]:
    """The range that prompts name: the configuration's, or the one on which the sources agree.

    Raises ValueError where they do not.
    """
    if config.score_min is not None:
        return float(config.score_min), float(config.score_max)
    ranges = {str(each.source): each.score_range or DEFAULT_SCORE_RANGE for each in opened}
    if len(set(ranges.values())) > 1:
        found = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items())
        raise ValueError(
            f"the data sets' scores have different ranges ({found}): set score_min and score_max to the range that "
            "prompts shall name; each set is mapped to it"
        )
    return next(iter(ranges.values()))


def named_sources(sources: list[Source]) -> dict[str, Source]:
    if len(sources) == 1 and not sources[0].name:
        return {"": sources[0]}
    named: dict[str, Source] = {}
    for source in sources:
        if source.label in named:
            raise ValueError(f"two evaluation sets are named {source.label!r}: name them apart with the option name")
        named[source.label] = source
    return named


def prompt_builder(
    config: DataConfig, tokenizer, score_range: tuple[float, float], wording: Wording | None = None
) -> PromptBuilder:
    """The builder of a run's prompts, with the options of its configuration."""
    return PromptBuilder(
        tokenizer,
        config.dimensions,
        score_range=score_range,
        order=config.prompt_order,
        max_length=config.max_length,
        template=wording or config.prompt_template,
        reasoning=config.reasoning,
        chat_template_kwargs=template_kwargs(config.chat_template_kwargs),
        template_date=config.template_date,
        truncated_responses=config.truncated_responses,
    )


class _Loader:
    def __init__(
        self,
        config: DataConfig,
        tokenizer,
        score_range: tuple[float, float],
        seed: int,
        folder: str | Path | None,
        wording: Wording | None,
        asked: float | None,
        *,
        one_of_several: bool,
    ):
        self.config, self.seed, self.folder = config, seed, None if folder is None else Path(folder)
        self.one_of_several, self.asked = one_of_several, asked
        self.reading = Reading(config.dimensions, score_range, config.missing_scores, config.tied_dimensions)
        self.builder = prompt_builder(config, tokenizer, score_range, wording)
        self.counts: dict[str, Counts] = {}
        self.prompts: set[bytes] | None = set() if config.eval_data else None  # of the sources since last emptied
        self.last_record = 0  # number of records of the source that was loaded last
        if config.streaming and folder is None:
            raise ValueError("streaming needs a folder for the token files")

    def check_known(self, opened: Sequence[OpenSource]) -> None:
        """Raises DataError for a dimension that none of the sources, which are read, has."""
        if self.one_of_several:
            known = set().union(*(source.score_names for source in opened))
            check_known(self.reading, known, ", ".join(str(source.source) for source in opened))

    def recipe(self, train: Sequence[PairTokens]) -> Recipe:
        """How the loaded pairs became prompts."""
        sources = {name: str(counts) for name, counts in self.counts.items()}
        return recipe_of_prompts(self.builder, {"pairs": len(train), "sources": sources})

    def load(
        self, opened: OpenSource, eval_share: float
    ) -> tuple[Sequence[PairTokens], Sequence[PairTokens]]:
        """Training pairs of a source and, of the given share of its prompts, evaluation pairs."""
        counts = Counts()
        name = str(opened.source)
        while name in self.counts:
            name += "'"
        self.counts[name] = counts
        self.last_record = 0
        held_out: list[PairTokens] = []
        items = self._tokens(opened, counts, eval_share, held_out)
        train: Sequence[PairTokens]
        if self.config.streaming:
            train = TokenStore.write(self.folder / f"set-{len(self.counts)}", items)
        else:
            train = list(items)
        if not counts.pairs and not held_out:
            raise no_usable_record(str(opened.source), [], counts.dropped)
        return train, held_out

    def _tokens(
        self, opened: OpenSource, counts: Counts, eval_share: float, held_out: list[PairTokens]
    ) -> Iterator[PairTokens]:
        batch: list[Pair] = []
        errors: list[DataError] = []

        def bad(error: DataError) -> None:
            if self.config.on_bad_record == "error":
                raise error
            counts.skipped[error.kind] += 1
            errors.append(error)
            if len(counts.examples) < _LISTED:
                counts.examples.append(str(error))

        def flush() -> Iterator[PairTokens]:
            for pair, tokens in zip(batch, self.builder.iter_tokens(batch), strict=True):
                if isinstance(tokens, DataError):
                    bad(tokens)
                    continue
                if isinstance(tokens, Dropped):
                    counts.dropped[tokens.reason] += 1
                    continue
                tokens = replace(tokens, record=number_of(pair))
                counts.truncated += tokens.truncated
                if is_held_out(pair, eval_share, self.seed):
                    counts.held_out += 1
                    held_out.append(tokens)
                else:
                    counts.pairs += 1
                    if self.prompts is not None:
                        self.prompts.add(prompt_key(pair))
                    yield tokens
            batch.clear()

        for item in iter_records(opened, self.reading, one_of_several=self.one_of_several):
            if isinstance(item, Pair):
                self.last_record = max(self.last_record, item.record + 1)
                batch.append(item if self.asked is None else asked_for(item, self.asked))
                if len(batch) == _BATCH:
                    yield from flush()
            elif isinstance(item, DataError):
                bad(item)
            else:
                counts.dropped[item.reason] += 1
        yield from flush()
        if errors and not counts.pairs and not held_out:
            raise no_usable_record(str(opened.source), errors, counts.dropped)


def asked_for(pair: Pair, score: float) -> Pair:
    """The pair as if the chosen response had this score in every dimension that it has one in."""
    return replace(pair, chosen_scores=dict.fromkeys(pair.chosen_scores, score))


def is_held_out(pair: Pair, share: float, seed: int) -> bool:
    """Whether the pair's prompt belongs to the evaluation share: a function of (seed, prompt), so that no prompt is on
    both sides and a set may be read in pieces."""
    if not share:
        return False
    digest = hashlib.blake2b(prompt_key(pair), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


@dataclass(frozen=True)
class _Part:
    pairs: Sequence[PairTokens]
    weight: float
    records: int


class Mixture(Sequence[PairTokens]):
    """Several sets as one. A weight w takes each pair floor(w) times and a share w - floor(w) of them once more, chosen
    by the seed. Record numbers are made to differ: the second set's go on behind the first one's."""

    def __init__(self, parts: Sequence[_Part], seed: int):
        self._parts = parts
        part_of, index_of, record_of = [], [], []
        base = 0
        for number, part in enumerate(parts):
            size = len(part.pairs)
            times = int(part.weight)
            extra = np.sort(shuffled_order(size, seed, number)[: round((part.weight - times) * size)])
            for repeat in range(times + bool(len(extra))):
                taken = np.arange(size) if repeat < times else extra
                index_of.append(taken)
                part_of.append(np.full(len(taken), number))
                record_of.append(np.full(len(taken), base + repeat * _REPEAT))
            base += part.records
        if not part_of:
            raise OptionError("the weights of train_data leave no pair to train on; raise weight")
        self._part, self._index, self._offset = (np.concatenate(x) for x in (part_of, index_of, record_of))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = self._parts[self._part[index]].pairs[int(self._index[index])]
        return replace(pair, record=pair.record + int(self._offset[index]))

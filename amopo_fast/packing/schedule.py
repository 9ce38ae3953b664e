"""Which pairs form a step and a micro-batch, planned an epoch at a time, and the noise of the weights.

Everything here is a pure function of (seed, epoch, record, ...): a run is the same under any split into ranks or
micro-batches and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from amopo_fast.data.order import shuffled_order
from amopo_fast.errors import DataError
from amopo_fast.packing.plan import Layout, Plan, build_plan, pair_sizes
from amopo_fast.prompts.tokens import PairTokens


def noise(seed: int, epoch: int, record: int, num_dimensions: int) -> np.ndarray:
    """(K, 2) float32 standard normal (dimension, side), by Philox and Box-Muller: the same on every numpy version."""
    # The record is in the second counter word: the first one counts the blocks that a record draws.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, record, 0, 0]).random_raw(4 * num_dimensions)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    u, v = uniform.reshape(2, num_dimensions, 2)
    return (np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)).astype(np.float32)


def _balanced(items: Sequence[int], tokens: np.ndarray, bins: int) -> list[list[int]]:
    """Split `items` into `bins` non-empty groups of about equal tokens, the longest group first; deterministic."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    load = [0] * bins
    for item in sorted(items, key=lambda i: (-tokens[i], i)):
        target = min(range(bins), key=lambda b: (load[b], len(groups[b]), b))
        groups[target].append(item)
        load[target] += int(tokens[item])
    order = sorted(range(bins), key=lambda b: (-load[b], b))
    return [groups[b] for b in order]


@dataclass(frozen=True)
class PairSizes:
    """Tokens of every pair of a data set in a layout, (pairs,) int64 each; see `Plan` for the words."""

    computed: np.ndarray  # in a plan of its own
    unshared: np.ndarray  # all its sequences one by one
    padded: np.ndarray  # its sequences padded to their longest
    labels: np.ndarray
    chosen: np.ndarray  # labels of chosen responses
    longest: np.ndarray  # in the layout SEPARATE the length of its rows, elsewhere 0

    @classmethod
    def of(cls, pairs: Sequence[PairTokens], layout: Layout = Layout.SHARED) -> PairSizes:
        return cls(*np.array([pair_sizes(pair, layout) for pair in pairs], dtype=np.int64).reshape(-1, 6).T)

    @property
    def share(self) -> float:
        """Computed per token of the separate sequences."""
        return float(self.computed.sum() / self.unshared.sum())

    def tokens(self, pairs: Sequence[int]) -> int:
        """Computed tokens of a plan of these pairs, at most: what they share with each other is not counted."""
        pairs = list(pairs)
        if not self.longest[pairs[0]]:
            return int(self.computed[pairs].sum())
        return int((self.computed[pairs] // self.longest[pairs]).sum() * self.longest[pairs].max())


def best_fit(items: Sequence[int], sizes: PairSizes, budget: int, bins: int = 1) -> list[list[int]]:
    """Split `items` into groups of at most `budget` computed tokens, heaviest item first, each into the fullest group
    that it fits (best-fit decreasing); an item above the budget has a group of its own.

    In the layout SEPARATE items come by length, each into the group whose rows are the least longer: padding counts.
    Groups are split further until there are `bins` of them or none has two items. The heaviest group comes first.
    """
    groups: list[list[int]] = []
    used: list[int] = []
    row: list[int] = []  # length of the group's rows, which is its first item's; 0 where it has none
    for item in sorted(items, key=lambda i: (-sizes.longest[i], -sizes.computed[i], i)):
        size, length = int(sizes.computed[item]), int(sizes.longest[item])
        added = [size // length * each if length else size for each in row]
        fits = [g for g in range(len(groups)) if used[g] + added[g] <= budget]
        if fits:
            target = min(fits, key=lambda g: (row[g], -used[g], g))
            groups[target].append(item)
            used[target] += added[target]
        else:
            groups.append([item])
            used.append(size)
            row.append(length)
    while len(groups) < bins:
        several = [g for g in range(len(groups)) if len(groups[g]) > 1]
        if not several:
            break
        heaviest = max(several, key=lambda g: (sizes.tokens(groups[g]), -g))
        groups += _halves(groups.pop(heaviest), sizes)
    return sorted(groups, key=lambda group: (-sizes.tokens(group), group))


def _halves(group: list[int], sizes: PairSizes) -> list[list[int]]:
    """Two groups of about equal tokens; rows, which stand by length, are cut in two, so that padding does not grow."""
    if not sizes.longest[group[0]]:
        return _balanced(group, sizes.computed, 2)
    cut = min(range(1, len(group)), key=lambda cut: max(sizes.tokens(group[:cut]), sizes.tokens(group[cut:])))
    return [group[:cut], group[cut:]]


@dataclass(frozen=True)
class MicroBatch:
    """Positions in the data set; `step_pairs` is the optimizer step's number of pairs over all ranks,
    `step_chosen_tokens` that of the label tokens of their chosen responses."""

    pairs: tuple[int, ...]
    epoch: int
    step_pairs: int
    step_chosen_tokens: int = 0
    weight: float = 1.0  # 0 for a filler that keeps a rank busy when it has no pairs left for a step


@dataclass(frozen=True)
class Epoch:
    """One rank's micro-batches of an epoch, `accumulation` to an optimizer step; its last step may hold fewer."""

    batches: list[MicroBatch]
    accumulation: int


@dataclass(frozen=True)
class Schedule:
    """How one rank's epochs are split into optimizer steps of `pairs_per_step` pairs and these into micro-batches.

    An epoch is planned when it begins, from its number and these alone: start-up, memory and the numbers of an epoch do
    not depend on how many there are.

    Raises:
        ValueError: fewer pairs in a step than ranks, or no pairs.
    """

    sizes: PairSizes
    pairs_per_step: int
    tokens_per_micro_batch: int
    seed: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self):
        if not len(self.sizes.computed):
            raise ValueError("there are no pairs to train on")
        if self.pairs_per_step < self.world_size:
            raise ValueError(
                f"pairs_per_step={self.pairs_per_step} is less than the {self.world_size} ranks; raise pairs_per_step"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of every epoch."""
        return -(-len(self.sizes.computed) // self.pairs_per_step)

    def epoch(self, number: int) -> Epoch:
        """Micro-batches are best-fit packed under `tokens_per_micro_batch` computed tokens; a pair above it stands
        alone.

        Every step of an epoch has the same number of them, which Trainer wants, and on every rank: the most that any
        step needs; a step that needs fewer is split further. The last step may hold fewer pairs. In a step the longest
        micro-batch comes first, and epoch 0 begins with the step that holds the longest pair, whatever the budget:
        memory is known in the first minute.
        """
        steps = self._shares(number)
        accumulation = self._accumulation(steps)
        batches: list[MicroBatch] = []
        for index, shares in enumerate(steps):
            count = sum(map(len, shares))
            chosen = int(self.sizes.chosen[list(chain(*shares))].sum())
            last = index == len(steps) - 1
            slots = min(accumulation, max(map(len, shares))) if last else accumulation
            own = shares[self.rank] if self.rank < len(shares) else []
            groups = best_fit(own, self.sizes, self.tokens_per_micro_batch, slots)
            batches += [MicroBatch(tuple(group), number, count, chosen) for group in groups]
            shortest = min(shares[0], key=lambda i: (self.sizes.computed[i], i))
            batches += [MicroBatch((shortest,), number, count, chosen, 0.0)] * (slots - len(groups))
        return Epoch(batches, accumulation)

    def accumulation(self, number: int) -> int:
        """Micro-batches of a step of that epoch."""
        return self._accumulation(self._shares(number))

    def _accumulation(self, steps: list[list[list[int]]]) -> int:
        return max(len(best_fit(share, self.sizes, self.tokens_per_micro_batch)) for share in chain(*steps))

    def _shares(self, number: int) -> list[list[list[int]]]:
        """The pairs of each step of an epoch, split over ranks."""
        tokens = self.sizes.computed
        order = shuffled_order(len(tokens), self.seed, number)
        steps = [order[i : i + self.pairs_per_step].tolist() for i in range(0, len(order), self.pairs_per_step)]
        if number == 0 and len(steps) > 1:
            # A short last step stays last: Trainer gives only the last one fewer micro-batches.
            full = len(steps) if len(steps[-1]) == self.pairs_per_step else len(steps) - 1
            longest = max(range(full), key=lambda i: (tokens[steps[i]].max(), -i))
            steps[0], steps[longest] = steps[longest], steps[0]
        return [_balanced(step, tokens, min(self.world_size, len(step))) for step in steps]

    def describe(self) -> str:
        """What an epoch costs, in words: token counts of the data set, this rank's longest micro-batch of epoch 0."""
        sizes, first = self.sizes, self.epoch(0)
        padded, unshared, computed, labels = (
            int(x.sum()) for x in (sizes.padded, sizes.unshared, sizes.computed, sizes.labels)
        )
        rows = [sizes.tokens(batch.pairs) for batch in first.batches]
        text = (
            f"{len(sizes.computed):,} pairs an epoch: {padded:,} tokens padded, {unshared:,} without padding, "
            f"{computed:,} computed ({padded / computed:.2f} padded tokens each), {labels:,} labels\n"
            f"{self.steps:,} optimizer steps an epoch; in the first {first.accumulation} micro-batches a step, of "
            f"{sum(rows) / len(rows):,.0f} computed tokens on average; the longest has {max(rows):,}, the first one "
            f"{max(rows[: first.accumulation]):,}"
        )
        above = int((sizes.computed > self.tokens_per_micro_batch).sum())
        if above:
            text += (
                f"\n{above:,} pairs are longer than tokens_per_micro_batch={self.tokens_per_micro_batch:,}: each is a "
                "micro-batch alone"
            )
        return text


class PlannedBatches(Sampler):
    """DataLoader batch_sampler over the micro-batches of the current epoch (`set_epoch`); yields [MicroBatch].

    plan: an epoch by its number, from 0, with which it begins.
    """

    def __init__(self, plan: Callable[[int], Epoch]):
        self._plan = plan
        self.epoch = plan(0)

    def set_epoch(self, number: int) -> Epoch:
        self.epoch = self._plan(number)
        return self.epoch

    def __len__(self) -> int:
        return len(self.epoch.batches)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return iter([[batch] for batch in self.epoch.batches])


@dataclass(frozen=True)
class Item:
    """Pairs with the micro-batch that they are (None: of an evaluation) and, if known, sums of their responses' label
    log-probs under the reference model, (pairs, K, 2) float32."""

    pairs: list[PairTokens]
    batch: MicroBatch | None
    references: np.ndarray | None


class PairDataset(Dataset):
    """Tokenized pairs: by int one pair (evaluation), by MicroBatch its pairs with what training needs of it.

    The sequence is read while training, so it may live on disk; a pair that cannot be read raises DataError.
    `references` is set where an objective has a reference model: (len(pairs), K, 2) float32, as in Item.
    """

    def __init__(self, pairs: Sequence[PairTokens]):
        self.pairs = pairs
        self.references: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | MicroBatch) -> Item:
        batch, indices = (key, list(key.pairs)) if isinstance(key, MicroBatch) else (None, [key])
        references = None if self.references is None else self.references[indices]
        return Item([self._read(index) for index in indices], batch, references)

    def _read(self, index: int) -> PairTokens:
        try:
            return self.pairs[index]
        except Exception as error:
            remedy = "check the file and its disk, then resume: no step is lost that a checkpoint holds"
            raise DataError("unreadable", f"{type(error).__name__}: {error}", remedy, record=index) from error


class Collator:
    """A micro-batch, or pairs to evaluate, to {"plan", "noise", "num_pairs", "num_chosen_tokens", "weight",
    "score_gaps"} and, where it is known, "reference_logps".

    noise is (P, K, 2) float32, zeros in evaluation; num_pairs and num_chosen_tokens are the loss's normalisers;
    score_gaps is (P, K) float32, NaN where there are no scores; reference_logps is (P * K * 2,) float32.
    """

    def __init__(self, seed: int, layout: Layout = Layout.SHARED):
        self.seed, self.layout = seed, layout

    def __call__(self, items: list[Item] | list[PairTokens]) -> dict[str, Plan | torch.Tensor]:
        items = [item if isinstance(item, Item) else Item([item], None, None) for item in items]
        pairs = [pair for item in items for pair in item.pairs]
        batch = items[0].batch
        if batch is not None:
            drawn = [noise(self.seed, batch.epoch, pair.record, len(pair.prompts)) for pair in pairs]
            count, labels, weight = batch.step_pairs, batch.step_chosen_tokens, batch.weight
        else:
            count, weight = len(pairs), 1.0
            labels = sum(len(pair.chosen) * sum(prompt is not None for prompt in pair.prompts) for pair in pairs)
            drawn = [np.zeros((len(pair.prompts), 2), dtype=np.float32) for pair in pairs]
        references = [item.references for item in items if item.references is not None]
        known = {"reference_logps": torch.from_numpy(np.concatenate(references)).flatten()} if references else {}
        return {
            **known,
            "plan": build_plan(pairs, self.layout),
            "noise": torch.from_numpy(np.stack(drawn)),
            "num_pairs": torch.tensor(float(count)),
            "num_chosen_tokens": torch.tensor(float(labels)),
            "weight": torch.tensor(weight),
            "score_gaps": torch.from_numpy(np.stack([pair.gaps() for pair in pairs])).float(),
        }

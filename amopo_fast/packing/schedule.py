"""Which pairs form a step and a micro-batch: planned for all epochs before training, and the noise of the weights.

Everything here is a pure function of (seed, epoch, record, ...): a run is the same under any split into ranks or
micro-batches and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from amopo_fast.data.order import shuffled_order
from amopo_fast.errors import DataError
from amopo_fast.packing.plan import Plan, build_plan, pair_sizes
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


def best_fit(items: Sequence[int], tokens: np.ndarray, budget: int, bins: int = 1) -> list[list[int]]:
    """Split `items` into groups of at most `budget` tokens, heaviest item first, each into the fullest group that it
    fits (best-fit decreasing); an item above the budget has a group of its own.

    Groups are split further until there are `bins` of them or none has two items. The heaviest group comes first.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda i: (-tokens[i], i)):
        size = int(tokens[item])
        fits = [g for g in range(len(groups)) if room[g] >= size]
        if fits:
            target = min(fits, key=lambda g: (room[g], g))
        else:
            target = len(groups)
            groups.append([])
            room.append(budget)
        groups[target].append(item)
        room[target] -= size
    while len(groups) < bins:
        several = [g for g in range(len(groups)) if len(groups[g]) > 1]
        if not several:
            break
        heaviest = max(several, key=lambda g: (tokens[groups[g]].sum(), -g))
        groups += _balanced(groups.pop(heaviest), tokens, 2)
    return sorted(groups, key=lambda group: (-tokens[group].sum(), group))


@dataclass(frozen=True)
class PairSizes:
    """Tokens of every pair of a data set, (pairs,) int64 each; see `Plan` for the words."""

    computed: np.ndarray  # in a row of its own, what is shared counted once
    unshared: np.ndarray  # all its sequences one by one
    padded: np.ndarray  # its sequences padded to their longest
    labels: np.ndarray
    chosen: np.ndarray  # labels of chosen responses

    @classmethod
    def of(cls, pairs: Sequence[PairTokens]) -> PairSizes:
        return cls(*np.array([pair_sizes(pair) for pair in pairs], dtype=np.int64).reshape(-1, 5).T)


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
class Schedule:
    """All epochs of one rank: `epochs[e]` is the list of micro-batches, `accumulation` to an optimizer step."""

    epochs: list[list[MicroBatch]]
    accumulation: int

    def describe(self, sizes: PairSizes, budget: int) -> str:
        """What an epoch costs, in words: token counts of the data set and this rank's longest micro-batch."""
        padded, unshared, computed, labels = (
            int(x.sum()) for x in (sizes.padded, sizes.unshared, sizes.computed, sizes.labels)
        )
        rows = [[int(sizes.computed[list(batch.pairs)].sum()) for batch in epoch] for epoch in self.epochs]
        first = max(rows[0][: self.accumulation])
        mean = sum(map(sum, rows)) / sum(map(len, rows))
        steps = -(-len(rows[0]) // self.accumulation)
        text = (
            f"{len(sizes.computed):,} pairs an epoch: {padded:,} tokens padded, {unshared:,} without padding, "
            f"{computed:,} computed ({padded / computed:.2f} padded tokens each), {labels:,} labels\n"
            f"{steps:,} optimizer steps an epoch, {self.accumulation} micro-batches each of {mean:,.0f} computed "
            f"tokens on average; the longest has {max(map(max, rows)):,}, the first one {first:,}"
        )
        above = int((sizes.computed > budget).sum())
        if above:
            text += f"\n{above:,} pairs are longer than tokens_per_micro_batch={budget:,}: each is a micro-batch alone"
        return text


def plan_epochs(
    tokens: Sequence[int],
    *,
    pairs_per_step: int,
    tokens_per_micro_batch: int,
    epochs: int,
    seed: int,
    world_size: int = 1,
    rank: int = 0,
    chosen_tokens: Sequence[int] | None = None,
) -> Schedule:
    """Split every epoch into optimizer steps of `pairs_per_step` pairs and these into micro-batches.

    Micro-batches are best-fit packed under `tokens_per_micro_batch` computed tokens; a pair above it stands alone.
    Every step of a run has the same number of them, which Trainer wants: the most that any step needs; a step that
    needs fewer is split further. The last step of an epoch may hold fewer pairs. Every rank has the same number of
    micro-batches. In a step the longest micro-batch comes first, and the run begins with the step that holds the
    longest pair, whatever the budget: memory is known in the first minute.

    Args:
        tokens: computed tokens of each pair.
        chosen_tokens: label tokens of each pair's chosen responses; default: not counted.

    Raises:
        ValueError: fewer pairs in a step than ranks, or no pairs.
    """
    if not len(tokens):
        raise ValueError("there are no pairs to train on")
    if pairs_per_step < world_size:
        raise ValueError(f"pairs_per_step={pairs_per_step} is less than the {world_size} ranks; raise pairs_per_step")
    sizes = np.asarray(tokens, dtype=np.int64)
    epochs_steps = []
    for epoch in range(epochs):
        order = shuffled_order(len(sizes), seed, epoch)
        steps = [order[i : i + pairs_per_step].tolist() for i in range(0, len(order), pairs_per_step)]
        if epoch == 0 and len(steps) > 1:
            # A short last step stays last: Trainer gives only the last one fewer micro-batches.
            full = len(steps) if len(steps[-1]) == pairs_per_step else len(steps) - 1
            longest = max(range(full), key=lambda i: (sizes[steps[i]].max(), -i))
            steps[0], steps[longest] = steps[longest], steps[0]
        epochs_steps.append([_balanced(step, sizes, min(world_size, len(step))) for step in steps])

    accumulation = max(
        len(best_fit(share, sizes, tokens_per_micro_batch))
        for steps in epochs_steps
        for shares in steps
        for share in shares
    )
    result = []
    for epoch, steps in enumerate(epochs_steps):
        batches: list[MicroBatch] = []
        for number, shares in enumerate(steps):
            count = sum(map(len, shares))
            labels = 0 if chosen_tokens is None else int(np.asarray(chosen_tokens)[list(chain(*shares))].sum())
            last = number == len(steps) - 1
            slots = min(accumulation, max(map(len, shares))) if last else accumulation
            own = shares[rank] if rank < len(shares) else []
            groups = best_fit(own, sizes, tokens_per_micro_batch, slots)
            batches += [MicroBatch(tuple(group), epoch, count, labels) for group in groups]
            filler = MicroBatch((min(shares[0], key=lambda i: (sizes[i], i)),), epoch, count, labels, 0.0)
            batches += [filler] * (slots - len(groups))
        result.append(batches)
    return Schedule(result, accumulation)


class PlannedBatches(Sampler):
    """DataLoader batch_sampler over the micro-batches of the current epoch (`set_epoch`); yields [MicroBatch]."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.schedule.epochs[0])

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return iter([[batch] for batch in self.schedule.epochs[self.epoch]])


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

    def __init__(self, seed: int):
        self.seed = seed

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
            "plan": build_plan(pairs),
            "noise": torch.from_numpy(np.stack(drawn)),
            "num_pairs": torch.tensor(float(count)),
            "num_chosen_tokens": torch.tensor(float(labels)),
            "weight": torch.tensor(weight),
            "score_gaps": torch.from_numpy(np.stack([pair.gaps() for pair in pairs])).float(),
        }

"""Which pairs form a step and a micro-batch: planned for all epochs before training, and the noise of the weights.

Everything here is a pure function of (seed, epoch, record, ...): a run is the same under any split into ranks or
micro-batches and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from amopo_fast.plan import Plan, build_plan
from amopo_fast.prompts import PairTokens


def noise(seed: int, epoch: int, record: int, num_dimensions: int) -> np.ndarray:
    """(K, 2) float32 standard normal (dimension, side), by Philox and Box-Muller: the same on every numpy version."""
    # The record is in the second counter word: the first one counts the blocks that a record draws.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, record, 0, 0]).random_raw(4 * num_dimensions)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    u, v = uniform.reshape(2, num_dimensions, 2)
    return (np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)).astype(np.float32)


def shuffled_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), by sorting Philox bits."""
    return np.argsort(np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, 0]).random_raw(count), kind="stable")


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
class MicroBatch:
    """Positions in the data set; `step_pairs` is the optimizer step's number of pairs over all ranks."""

    pairs: tuple[int, ...]
    epoch: int
    step_pairs: int
    weight: float = 1.0  # 0 for a filler that keeps a rank busy in a short last step


@dataclass(frozen=True)
class Schedule:
    """All epochs of one rank: `epochs[e]` is the list of micro-batches, `accumulation` to an optimizer step."""

    epochs: list[list[MicroBatch]]
    accumulation: int


def plan_epochs(
    tokens: Sequence[int],
    *,
    pairs_per_step: int,
    tokens_per_micro_batch: int,
    epochs: int,
    seed: int,
    world_size: int = 1,
    rank: int = 0,
) -> Schedule:
    """Split every epoch into optimizer steps of `pairs_per_step` pairs and these into micro-batches.

    The number of micro-batches in a step is one number for the whole run: the least with which every micro-batch of
    several pairs stays within `tokens_per_micro_batch` computed tokens per rank. The last step of an epoch may hold
    fewer pairs. Every rank has the same number of micro-batches.

    Raises:
        ValueError: fewer pairs in a step than ranks, or no pairs.
    """
    if not len(tokens):
        raise ValueError("there are no pairs to train on")
    if pairs_per_step < world_size:
        raise ValueError(f"pairs_per_step={pairs_per_step} is less than the {world_size} ranks; raise pairs_per_step")
    sizes = np.asarray(tokens, dtype=np.int64)
    steps_of = []
    for epoch in range(epochs):
        order = shuffled_order(len(sizes), seed, epoch)
        steps = [order[i : i + pairs_per_step].tolist() for i in range(0, len(order), pairs_per_step)]
        steps_of.append(steps)

    accumulation = 1
    for steps in steps_of:
        for step in steps:
            share = _balanced(step, sizes, min(world_size, len(step)))
            for items in share:
                while accumulation < len(items) and any(
                    len(group) > 1 and sizes[group].sum() > tokens_per_micro_batch
                    for group in _balanced(items, sizes, accumulation)
                ):
                    accumulation += 1

    result = []
    for epoch, steps in enumerate(steps_of):
        batches: list[MicroBatch] = []
        for number, step in enumerate(steps):
            shares = _balanced(step, sizes, min(world_size, len(step)))
            last = number == len(steps) - 1
            slots = min(accumulation, max(len(s) for s in shares)) if last else accumulation
            own = shares[rank] if rank < len(shares) else []
            groups = _balanced(own, sizes, min(slots, len(own))) if own else []
            batches += [MicroBatch(tuple(g), epoch, len(step)) for g in groups]
            filler = MicroBatch((step[0],), epoch, len(step), 0.0)
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


class PairDataset(Dataset):
    """Tokenized pairs: by int one pair (evaluation), by MicroBatch its pairs with what training needs of it."""

    def __init__(self, pairs: Sequence[PairTokens]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | MicroBatch):
        if isinstance(key, MicroBatch):
            return [self.pairs[i] for i in key.pairs], key
        return self.pairs[key]


class Collator:
    """A micro-batch, or a list of pairs to evaluate, to {"plan", "noise", "num_pairs", "weight"}.

    noise is (P, K, 2) float32, zeros in evaluation; num_pairs is the loss's normaliser.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, items: list) -> dict[str, Plan | torch.Tensor]:
        if isinstance(items[0], tuple):
            pairs, batch = items[0]
            drawn = [noise(self.seed, batch.epoch, pair.record, len(pair.prompts)) for pair in pairs]
            count, weight = batch.step_pairs, batch.weight
        else:
            pairs, count, weight = items, len(items), 1.0
            drawn = [np.zeros((len(pair.prompts), 2), dtype=np.float32) for pair in pairs]
        return {
            "plan": build_plan(pairs),
            "noise": torch.from_numpy(np.stack(drawn)),
            "num_pairs": torch.tensor(float(count)),
            "weight": torch.tensor(weight),
        }

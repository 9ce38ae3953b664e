"""The epochs of a run: how they are planned, and what is said about them before the first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import TrainerCallback

from amopo_fast.errors import OptionError
from amopo_fast.models.scoring import backend_for
from amopo_fast.optim.choose import in_backward_refusal
from amopo_fast.packing.schedule import Epoch, PairSizes, Schedule
from amopo_fast.training.checks import check_engine

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig

_PAIRS_AHEAD = 100_000  # planned in seconds
_ROUNDED = 1024  # tokens, to which a row that nobody chose is rounded up


def schedule_of(args: AMoPOConfig, sizes: PairSizes) -> Schedule:
    """Of this rank. Settles `tokens_per_micro_batch` where a step in the backward pass needs more than its default.

    Raises:
        ValueError: fewer pairs in a step than ranks, or none.
    """
    if tokens := _row_of_a_step(args, sizes):
        args.tokens_per_micro_batch = tokens
    return Schedule(
        sizes, args.pairs_per_step, args.row_tokens, args.seed, args.world_size, args.process_index
    )


def tokens_of_longest(sizes: PairSizes) -> np.ndarray:
    """(pairs,) int64: computed tokens of a row of the longest 1, 2, ... pairs, which no others exceed."""
    padded = sizes.longest.max()
    tokens = sizes.computed // sizes.longest * padded if padded else sizes.computed
    return np.sort(tokens)[::-1].cumsum()


def _row_of_a_step(args: AMoPOConfig, sizes: PairSizes) -> int | None:
    """With which every step of every epoch is one row, where nobody set it; None: the default is enough."""
    if not args.optim_in_backward or args.tokens_per_micro_batch is not None or not len(sizes.computed):
        return None
    tokens = int(tokens_of_longest(sizes)[: args.pairs_per_step][-1])
    return -(-tokens // _ROUNDED) * _ROUNDED if tokens > args.row_tokens else None


def costs(args: AMoPOConfig, schedule: Schedule) -> str:
    """What an epoch costs, and with the step inside the backward pass how many pairs its one row holds and could hold:
    the longer it is, the more computation there is for the optimizer's update, and for copies from and to the host."""
    text = schedule.describe()
    if args.optim_in_backward:
        most = pairs_within(schedule.sizes, schedule.tokens_per_micro_batch)
        text += f"\na step is one row of {schedule.pairs_per_step:,} pairs"
        if most > schedule.pairs_per_step:
            text += (
                f"; with pairs_per_step={most} every row still fits into tokens_per_micro_batch="
                f"{schedule.tokens_per_micro_batch:,}, and is longer"
            )
    return text


def row_line(args: AMoPOConfig, sizes: PairSizes, tokens: int) -> str:
    """How many pairs a step could have where its row may have so many computed tokens."""
    return (f"rows of {tokens:,} computed tokens would fit too, which is a step of pairs_per_step="
            f"{pairs_within(sizes, tokens):,} pairs; this run's has {args.pairs_per_step:,}")  # fmt: skip


def pairs_within(sizes: PairSizes, tokens: int) -> int:
    """Of any pairs, how many always fit into a row of so many computed tokens."""
    return int(np.searchsorted(tokens_of_longest(sizes), tokens, side="right"))


def most_micro_batches(args: AMoPOConfig, schedule: Schedule) -> int:
    """Of a step, in as many of the run's epochs as can be planned in seconds."""
    epochs = math.ceil(args.max_steps / schedule.steps if args.max_steps > 0 else args.num_train_epochs)
    ahead = max(1, _PAIRS_AHEAD // len(schedule.sizes.computed))
    return max(schedule.accumulation(number) for number in range(min(epochs, ahead)))


def require_one_micro_batch(args: AMoPOConfig, number: int, epoch: Epoch) -> None:
    """Raises OptionError where an epoch has more in a step and the optimizer steps in the backward pass."""
    if args.optim_in_backward and (reason := in_backward_refusal(args, epoch.accumulation)):
        raise OptionError(f"optim_in_backward={args.optim_in_backward}, epoch {number}: {reason}; then resume")


class Description(TrainerCallback):
    """When a run begins: it computes with the engine that was asked for, and prints what it costs."""

    def __init__(self, text: str):
        self.text = text

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_engine(model, args)
        half = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=half, enabled=bool(args.bf16 or args.fp16)):
            backend = backend_for(model, args.device, args.attention_backend)
        if state.is_world_process_zero:
            print(f"{self.text}\nattention: {backend}", flush=True)

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


def schedule_of(args: AMoPOConfig, sizes: PairSizes) -> Schedule:
    """Of this rank. Raises ValueError for fewer pairs in a step than ranks, or none."""
    return Schedule(
        sizes, args.pairs_per_step, args.row_tokens, args.seed, args.world_size, args.process_index
    )


def costs(args: AMoPOConfig, schedule: Schedule) -> str:
    """What an epoch costs, and with the step inside the backward pass how many pairs its one row holds and could hold:
    the longer it is, the more computation there is for the optimizer's update, and for copies from and to the host."""
    text = schedule.describe()
    if args.optim_in_backward:
        sizes, padded = schedule.sizes, schedule.sizes.longest.max()
        tokens = sizes.computed // sizes.longest * padded if padded else sizes.computed
        longest = np.sort(tokens)[::-1].cumsum()  # of the longest 1, 2, ... pairs
        most = int(np.searchsorted(longest, schedule.tokens_per_micro_batch, side="right"))
        text += f"\na step is one row of {schedule.pairs_per_step:,} pairs"
        if most > schedule.pairs_per_step:
            text += (
                f"; with pairs_per_step={most} every row still fits into tokens_per_micro_batch="
                f"{schedule.tokens_per_micro_batch:,}, and is longer"
            )
    return text


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

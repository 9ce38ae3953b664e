"""The epochs of a run: how many are planned, and which one the batches are taken from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from amopo_fast.models.scoring import backend_for
from amopo_fast.packing.schedule import PlannedBatches

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig


def epochs_to_plan(args: AMoPOConfig, num_pairs: int) -> int:
    """A fractional last epoch ends by max_steps, so the plan covers it whole."""
    if args.max_steps > 0:
        return math.ceil(args.max_steps / math.ceil(num_pairs / args.pairs_per_step))
    return math.ceil(args.num_train_epochs)


class EpochOfPlan(TrainerCallback):
    def __init__(self, batches: PlannedBatches, description: str):
        self.batches = batches
        self.description = description

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        half = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=half, enabled=bool(args.bf16 or args.fp16)):
            backend = backend_for(model, args.device, args.attention_backend)
        if state.is_world_process_zero:
            print(f"{self.description}\nattention: {backend}", flush=True)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # On a resume within an epoch, state.epoch is a fraction; rounding keeps 1 - 1e-16 from meaning epoch 0.
        self.batches.set_epoch(math.floor(round(state.epoch or 0.0, 6)))

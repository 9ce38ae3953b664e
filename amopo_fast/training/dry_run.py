"""`--dry_run`: two steps on the run's longest micro-batch, what was predicted and what the second one took.

The first step creates the optimizer's states.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from amopo_fast.memory.estimate import Estimate, Row, estimate
from amopo_fast.memory.gpus import GIB
from amopo_fast.memory.preflight import longest_micro_batch
from amopo_fast.memory.profile import LiveBytes
from amopo_fast.models.choice import choice_of
from amopo_fast.packing.schedule import Epoch, PairSizes, PlannedBatches
from amopo_fast.training.loading import run_of

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.trainer import AMoPOTrainer


@dataclass(frozen=True)
class DryRun:
    """bytes and seconds of one optimizer step."""

    prediction: Estimate
    row: Row
    measured: int
    seconds: float
    micro_batches: int
    device: str


class _SecondStep(TrainerCallback):
    def __init__(self, live: LiveBytes | None):
        self.live = live
        self.peak = 0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.live is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.peak = self.live.live
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.live is None:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin
        self.peak = torch.cuda.max_memory_allocated() if self.live is None else self.live.peak


def prepare_dry_run(args: AMoPOConfig, folder: str) -> None:
    """Two steps, nothing saved, into `folder`; before the trainer is made."""
    args.output_dir = folder
    args.max_steps = 2
    args.save_strategy = args.eval_strategy = "no"
    args.report_to = []


def dry_run(trainer: AMoPOTrainer) -> DryRun:
    """Train two steps on the run's longest micro-batch and measure the second. The model is changed by them.

    Off CUDA the tensors' bytes are counted as they are made and freed, which costs time.
    """
    args, model = trainer.args, trainer.model
    pairs = trainer.train_dataset.pairs
    epoch = trainer._batches.epoch
    batch = longest_micro_batch(epoch, PairSizes.of(pairs, choice_of(model).layout))
    micro_batches = epoch.accumulation
    two_steps = Epoch([replace(batch, epoch=0)] * (2 * micro_batches), micro_batches)
    trainer._batches = PlannedBatches(lambda number: two_steps)

    row, setup = run_of(args, model, pairs, epoch)
    prediction = estimate(model.config, row, replace(setup, head_cache=trainer.head_cache.bytes))
    live = None if args.device.type == "cuda" else LiveBytes()
    second = _SecondStep(live)
    trainer.add_callback(second)
    if live is None:
        trainer.train()
    else:
        live.include(model.parameters())
        with live:
            trainer.train()
    return DryRun(prediction, row, second.peak, second.seconds, micro_batches, str(args.device))


def print_dry_run(result: DryRun) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One step, longest micro-batch: {result.row.tokens:,} computed tokens, {result.device}")
    table.add_column("GiB")
    table.add_column("predicted", justify="right")
    table.add_column("measured", justify="right")
    for name, size in result.prediction.parts.items():
        table.add_row(name, f"{size / GIB:.3f}", "")
    table.add_row("peak", f"{result.prediction.peak / GIB:.3f}", f"{result.measured / GIB:.3f}", style="bold")
    console = Console()
    console.print(table)
    tokens = result.row.tokens * result.micro_batches
    console.print(
        f"peak in the {result.prediction.moment}; prediction / measurement "
        f"{result.prediction.peak / max(result.measured, 1):.3f}; {result.seconds:.2f} s a step, "
        f"{tokens / result.seconds:,.0f} computed tokens/s", soft_wrap=True,
    )  # fmt: skip

"""Before a run: does it fit into the GPU, in which precision are its weights, and, with --dry_run, a step to measure.

The check compares the estimate for the run's longest micro-batch with the memory that the GPU has free, before any
weight is loaded. The dry run trains two steps on that micro-batch, the first to create the optimizer's states, and
prints what was predicted and what the second one took.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig, TrainerCallback

from amopo_fast.batching import MicroBatch, PairSizes, PlannedBatches, Schedule, plan_epochs
from amopo_fast.estimate import GIB, Estimate, Row, Setup, estimate
from amopo_fast.estimate_advice import first_remedy
from amopo_fast.loading import load_model, load_shape
from amopo_fast.optim.choose import IN_BACKWARD, STATES_OF_OPTIM
from amopo_fast.plan import Plan, build_plan
from amopo_fast.precision import weights_dtype
from amopo_fast.profile_memory import LiveBytes
from amopo_fast.prompts import PairTokens

if TYPE_CHECKING:
    from amopo_fast.config import AMoPOConfig, ModelConfig
    from amopo_fast.trainer import AMoPOTrainer


class DoesNotFit(ValueError):
    """The run needs more memory than the GPU has; the message names both and a change that fits."""


def setup_of(
    args: AMoPOConfig, dtype: torch.dtype, *, lora_rank: int | None, quantised: bool, nested: bool, accumulates: bool
) -> Setup:
    """The estimate's view of a run. An `--optim` that is not AdamW counts as one with float32 states."""
    weights = "fp32" if dtype == torch.float32 else "bf16"
    states = STATES_OF_OPTIM.get(str(getattr(args.optim, "value", args.optim)), "fp32")
    if args.optim_in_backward:
        states = IN_BACKWARD[args.optim_in_backward]
    elif weights == "bf16" and args.weight_precision == "bf16" and states == "fp32" and lora_rank is None:
        states = "bf16"  # torch keeps its states in the weights' dtype
    checkpointing = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
    options = args.gradient_checkpointing_kwargs or {}
    return Setup(
        states=states, weights=weights, in_backward=bool(args.optim_in_backward), checkpointing=checkpointing,
        keep_layers=args.keep_layers, offload=bool(options.get("offload")), lora_rank=lora_rank, quantised=quantised,
        nested=nested, accumulates=accumulates, gpus=args.world_size if args.fsdp else 1,
        liger=bool(args.use_liger_kernel),
    )  # fmt: skip


def row_of(plan: Plan) -> Row:
    return Row(plan.num_tokens, plan.labels.shape[0], plan.kv_indices.shape[0], plan.max_seqlen_k)


def longest_micro_batch(schedule: Schedule, sizes: PairSizes) -> MicroBatch:
    """The first epoch's micro-batch with the most computed tokens."""
    return max(schedule.epochs[0], key=lambda batch: int(sizes.computed[list(batch.pairs)].sum()))


def longest_row(pairs: Sequence[PairTokens], args: AMoPOConfig) -> tuple[Row, bool]:
    """(the longest micro-batch of the run's first epoch, whether a step has several)."""
    sizes = PairSizes.of(pairs)
    schedule = plan_epochs(
        sizes.computed.tolist(), pairs_per_step=args.pairs_per_step, tokens_per_micro_batch=args.tokens_per_micro_batch,
        epochs=1, seed=args.seed, world_size=args.world_size, rank=args.process_index,
    )  # fmt: skip
    plan = build_plan([pairs[i] for i in longest_micro_batch(schedule, sizes).pairs])
    return row_of(plan), schedule.accumulation > 1


def require_fit(name: str, config: PretrainedConfig, row: Row, setup: Setup, free: int) -> Estimate:
    """The estimate of a run of the model `name`, if it fits into `free` bytes.

    Raises:
        DoesNotFit
    """
    prediction = estimate(config, row, setup)
    if prediction.needed <= free:
        return prediction
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in prediction.parts.items() if size > GIB / 20)
    remedy = first_remedy(config, row, setup, free)
    change = "no change of optimizer, precision or adapter makes it fit: share the model between GPUs"
    if remedy:
        change = f"what fits, in {remedy[1].needed / GIB:.1f} GiB: {remedy[0]}"
    raise DoesNotFit(
        f"{name}: this run needs about {prediction.needed / GIB:.1f} GiB on each GPU ({parts}, for {row.tokens} "
        f"computed tokens in the longest micro-batch), and {free / GIB:.1f} GiB are free; {change}. `amopo-fast "
        "estimate` compares all ways; --memory_check false skips this check"
    )


def load_for_training(
    config: ModelConfig, args: AMoPOConfig, pairs: Sequence[PairTokens] | None, *, adapter: bool
) -> nn.Module:
    """Choose the weights' precision, check that the run fits, and load the model on its device.

    Args:
        pairs: the training data; without it, or off CUDA, nothing is checked and "auto" is float32.
        adapter: whether an adapter will be trained over it.

    Raises:
        DoesNotFit: the run needs more memory than is free.
    """
    shape = load_shape(config)
    checks = args.device.type == "cuda" and bool(pairs) and args.deepspeed is None
    row, accumulates = longest_row(pairs, args) if checks else (None, False)
    free = torch.cuda.mem_get_info(args.device)[0] if checks else 0

    def setup(dtype: torch.dtype) -> Setup:
        return setup_of(
            args, dtype, lora_rank=config.lora_r if adapter else None, quantised=config.load_in_4bit,
            nested=config.use_bnb_nested_quant, accumulates=accumulates,
        )  # fmt: skip

    dtype = weights_dtype(
        args.weight_precision,
        device=args.device,
        adapter=adapter,
        fp32_fits=lambda: not checks or estimate(shape, row, setup(torch.float32)).needed <= free,
    )
    if checks and args.memory_check:
        prediction = require_fit(config.model_name_or_path, shape, row, setup(dtype), free)
        if args.process_index == 0:
            print(f"weights in {str(dtype).removeprefix('torch.')}; about {prediction.needed / GIB:.1f} of "
                  f"{free / GIB:.1f} GiB free on each GPU will be needed", flush=True)  # fmt: skip
    return load_model(config, args, dtype)


# ----- the dry run -----


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
    schedule = trainer._batches.schedule
    batch = longest_micro_batch(schedule, PairSizes.of(pairs))
    row = row_of(build_plan([pairs[i] for i in batch.pairs]))
    micro_batches = schedule.accumulation
    trainer._batches = PlannedBatches(Schedule([[replace(batch, epoch=0)] * (2 * micro_batches)], micro_batches))

    adapters = getattr(model, "peft_config", None)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and (adapters or p.requires_grad)}
    setup = setup_of(
        args, torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32,
        lora_rank=next(iter(adapters.values())).r if adapters else None,
        quantised=getattr(model, "is_loaded_in_4bit", False), nested=False, accumulates=micro_batches > 1,
    )  # fmt: skip
    prediction = estimate(model.config, row, setup)
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

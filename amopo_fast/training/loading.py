"""The model of a run: its weights' precision, the check that the run fits, and the loading itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from amopo_fast.memory.estimate import GIB, HEAD_SLICE, Estimate, Row, Setup, cache_bytes, estimate
from amopo_fast.memory.preflight import (
    free_host_memory,
    longest_micro_batch,
    require_fit,
    require_host_memory,
    row_of,
)
from amopo_fast.memory.profile import meta_model
from amopo_fast.models.check import choose_layout
from amopo_fast.models.choice import choice_of
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_model, load_shape
from amopo_fast.models.precision import weights_dtype
from amopo_fast.models.streaming import (
    SLOTS,
    StreamedWeights,
    host_bytes,
    memory_for,
    slots_within,
    stream_weights,
    streamed_of,
)
from amopo_fast.optim.choose import IN_BACKWARD, STATES_OF_OPTIM
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.packing.schedule import Epoch, PairSizes
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.epochs import schedule_of
from amopo_fast.training.host_memory import refuse_in_host_memory
from amopo_kernels.head.torch_slices import slice_columns

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig

FILLED = 0.95  # of a GPU's memory, which what nobody asked for may fill


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
    on_torch = args.kernel_backend == "torch" or args.device.type == "cpu"
    return Setup(
        states=states, weights=weights, in_backward=bool(args.optim_in_backward), checkpointing=checkpointing,
        host_states=args.optimizer_states == "host", host_weights=args.weights == "host",
        keep_layers=args.keep_layers,
        offload=bool(options.get("offload")), lora_rank=lora_rank, quantised=quantised,
        nested=nested, accumulates=accumulates, gpus=args.world_size if args.fsdp else 1,
        liger=bool(args.use_liger_kernel),
        head_cache=args.logits_cache_bytes or 0,
        head_slice=slice_columns(args.device) if on_torch else HEAD_SLICE,
    )  # fmt: skip


def longest_row(pairs: Sequence[PairTokens], args: AMoPOConfig, layout: Layout = Layout.SHARED) -> tuple[Row, bool]:
    """(the longest micro-batch of the run's first epoch, whether a step has several)."""
    sizes = PairSizes.of(pairs, layout)
    epoch = schedule_of(args, sizes).epoch(0)
    plan = build_plan([pairs[i] for i in longest_micro_batch(epoch, sizes).pairs], layout)
    return row_of(plan), epoch.accumulation > 1


def run_of(args: AMoPOConfig, model: nn.Module, pairs: Sequence[PairTokens], epoch: Epoch) -> tuple[Row, Setup]:
    """(the epoch's longest micro-batch, the estimate's view of the run) of a loaded model, after `prepare_model`."""
    layout = choice_of(model).layout
    batch = longest_micro_batch(epoch, PairSizes.of(pairs, layout))
    adapters = getattr(model, "peft_config", None)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and (adapters or p.requires_grad)}
    setup = setup_of(
        args, torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32,
        lora_rank=next(iter(adapters.values())).r if adapters else None,
        quantised=getattr(model, "is_loaded_in_4bit", False), nested=False, accumulates=epoch.accumulation > 1,
    )  # fmt: skip
    if streamed := streamed_of(model):
        setup = replace(setup, weight_slots=streamed.slots)
    return row_of(build_plan([pairs[i] for i in batch.pairs], layout)), setup


def weight_slots(shape: PretrainedConfig, row: Row, setup: Setup, sizes: Sequence[int], free: int) -> int:
    """Layers of `sizes` bytes (`host_bytes`) that are on a GPU of `free` bytes at once, with `weights` host: what the
    estimate leaves of FILLED of it, beside a head that keeps all that it can.

    The more, the less is copied, and the further ahead of the computation.
    """
    whole = replace(setup, head_cache=max(setup.head_cache, cache_bytes(shape, row)))
    return slots_within(sizes, FILLED * (free // GIB * GIB) - estimate(shape, row, whole).needed)


def _host_line(prediction: Estimate) -> str:
    pinned = prediction.host_needed
    return f", and {pinned / GIB:.1f} GiB of pinned host memory" if pinned else ""


def load_for_training(
    config: ModelConfig, args: AMoPOConfig, pairs: Sequence[PairTokens] | None, *, adapter: bool
) -> nn.Module:
    """Choose the weights' precision, check that the run fits, and load the model on its device, or with `weights` host
    into pinned host memory, which is taken first.

    Args:
        pairs: the training data; without it, or off CUDA, nothing is checked and "auto" is float32.
        adapter: whether an adapter will be trained over it.

    Raises:
        DoesNotFit: the run needs more memory than is free. RuntimeError: host memory that cannot be had.
    """
    refuse_in_host_memory(args, adapter=adapter)
    shape = load_shape(config)
    checks = args.device.type == "cuda" and bool(pairs) and args.deepspeed is None
    row, accumulates = None, False
    if checks:
        row, accumulates = longest_row(pairs, args, choose_layout(meta_model(shape), args.layout).layout)
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
        require_host_memory(config.model_name_or_path, prediction, free_host_memory())
        if args.process_index == 0:
            print(f"weights in {str(dtype).removeprefix('torch.')}; about {prediction.needed / GIB:.1f} of "
                  f"{free / GIB:.1f} GiB free on each GPU will be needed"
                  f"{_host_line(prediction)}", flush=True)  # fmt: skip
    if args.weights != "host":
        return load_model(config, args, dtype)
    sizes = host_bytes(meta_model(shape, dtype))
    slots = SLOTS
    if checks and args.memory_check:
        slots = weight_slots(shape, row, setup(dtype), sizes, free)
        print(f"weights: {slots} of {len(sizes)} layers are on the GPU at once", flush=True)
    memory = memory_for(sizes, args.device)
    model = load_model(config, args, dtype)  # in the file's own dtype it is the file, mapped: there is no second copy
    stream_weights(model, args.device, memory, slots)
    return model


def streamed_weights(model: nn.Module, args: AMoPOConfig) -> StreamedWeights | None:
    """What moves the weights of a trainer's model, with `weights` host. Raises as `stream_weights`."""
    refuse_in_host_memory(args, adapter=hasattr(model, "peft_config"))
    if args.weights != "host":
        return None
    return streamed_of(model) or stream_weights(model, args.device)

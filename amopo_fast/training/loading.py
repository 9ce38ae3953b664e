"""The model of a run: its weights' precision, the check that the run fits, and the loading itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate
from amopo_fast.memory.gpus import GIB, gpu_here
from amopo_fast.memory.parameters import tried
from amopo_fast.memory.preflight import (
    Room,
    copies_line,
    fit_line,
    free_host_memory,
    longest_micro_batch,
    longest_that_fits,
    require_fit,
    row_of,
    row_that_fits,
)
from amopo_fast.memory.profile import meta_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.depth import depth_of
from amopo_fast.models.loading import load_model, load_shape
from amopo_fast.models.precision import weights_dtype
from amopo_fast.models.streaming import (
    SLOTS,
    StreamedWeights,
    homes_in,
    host_bytes,
    memory_for,
    stream_weights,
    streamed_of,
)
from amopo_fast.optim.choose import IN_BACKWARD, STATES_OF_OPTIM
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.packing.schedule import Epoch, PairSizes
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.epochs import row_line, schedule_of
from amopo_fast.training.host_memory import refuse_in_host_memory
from amopo_kernels.head.torch_slices import slice_columns

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig

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
        liger=bool(args.use_liger_kernel), autocast=bool(args.bf16 or args.fp16),
        head_cache=args.logits_cache_bytes or 0,
        head_slice=slice_columns(args.device) if on_torch else None,
    )  # fmt: skip


def longest_row(
    pairs: Sequence[PairTokens], sizes: PairSizes, args: AMoPOConfig, layout: Layout = Layout.SHARED,
    tokens: int | None = None,
) -> tuple[Row, bool]:  # fmt: skip
    """(the longest micro-batch of the run's first epoch, whether a step has several); with micro-batches of at most
    `tokens` computed tokens, if given.

    sizes: of the pairs in the layout.
    """
    schedule = schedule_of(args, sizes)
    epoch = replace(schedule, tokens_per_micro_batch=tokens or schedule.tokens_per_micro_batch).epoch(0)
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


def room_for(args: AMoPOConfig) -> Room:
    """What is free for this process, on its device and of its share of the host's memory."""
    host = free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.device.type != "cuda":
        return Room(None, host)
    offloads = bool((args.gradient_checkpointing_kwargs or {}).get("offload"))
    return Room(gpu_here(args.device, copies=offloads or "host" in (args.optimizer_states, args.weights)), host)


def slots_in(prediction: Estimate, room: Room) -> int:
    """Layers whose weights are on the device at once, with weights in host memory."""
    return prediction.slots_on(room.gpu.memory) if room.gpu else SLOTS


def _most_tokens(pair: PairTokens) -> int:
    """Computed tokens of a pair that shares nothing."""
    prompts = [len(prompt) for prompt in pair.prompts if prompt is not None]
    return 2 * sum(prompts) + len(prompts) * (len(pair.chosen) + len(pair.rejected))


def _longest_tokens(pairs: Sequence[PairTokens], args: AMoPOConfig) -> int:
    """Of a micro-batch, at most; above its budget is a pair alone, or a whole step in the backward pass."""
    alone = 1 if args.tokens_per_micro_batch or not args.optim_in_backward else args.pairs_per_step
    return sum(sorted(map(_most_tokens, pairs))[-alone:])


def surely_fits(config: PretrainedConfig, args: AMoPOConfig, longest: int, free: int) -> bool:
    """Whether a run on a CPU is so small that nothing need be estimated, by generous bounds: 16 bytes a parameter, and
    400 a token, layer and channel."""
    text = config.get_text_config()
    rows = max(args.row_tokens, longest) * (400 * depth_of(text) * text.hidden_size + 8 * text.vocab_size)
    return 16 * sum(p.numel() for p in meta_model(config).parameters()) + rows < free / 4


def load_for_training(
    config: ModelConfig, args: AMoPOConfig, pairs: Sequence[PairTokens] | None, *, adapter: bool
) -> nn.Module:
    """Choose the weights' precision, check that the run fits, and load the model on its device, or with `weights` host
    into pinned host memory, which is taken first. On a CPU the default of `tokens_per_micro_batch` becomes the largest
    of 8192, 4096, ..., 512 that fits; a step in the backward pass stays one row.

    Args:
        pairs: the training data; without it nothing is checked, and "auto" is float32, as it is off CUDA.
        adapter: whether an adapter will be trained over it.

    Raises:
        DoesNotFit: the run needs more memory than is free. RuntimeError: host memory that cannot be had.
    """
    refuse_in_host_memory(args, adapter=adapter)
    shape = load_shape(config)
    on_gpu = args.device.type == "cuda"
    room = room_for(args)
    checks = bool(pairs) and args.deepspeed is None and (on_gpu or args.memory_check)
    if checks and not on_gpu:
        checks = not surely_fits(shape, args, _longest_tokens(pairs, args), room.host)
    if checks:
        layout = tried(shape, args.layout).choice.layout
        sizes = PairSizes.of(pairs, layout)

    def setup(dtype: torch.dtype, accumulates: bool) -> Setup:
        return setup_of(
            args, dtype, lora_rank=config.lora_r if adapter else None, quantised=config.load_in_4bit,
            nested=config.use_bnb_nested_quant, accumulates=accumulates,
        )  # fmt: skip

    def fits(dtype: torch.dtype, tokens: int | None = None) -> bool:
        row, accumulates = longest_row(pairs, sizes, args, layout, tokens)
        return room.fits(estimate(shape, row, setup(dtype, accumulates)))

    dtype = weights_dtype(
        args.weight_precision,
        device=args.device,
        adapter=adapter,
        fp32_fits=lambda: not checks or fits(torch.float32),
    )
    if checks and args.memory_check:
        name, first = config.model_name_or_path, args.process_index == 0
        if not on_gpu and args.tokens_per_micro_batch is None and not args.optim_in_backward:
            tokens = row_that_fits(args.row_tokens, lambda tokens: fits(dtype, tokens))
            if tokens < args.row_tokens:
                args.tokens_per_micro_batch = tokens
                if first:
                    print(f"tokens_per_micro_batch: {tokens}, as {room.host / GIB:.1f} GiB are free", flush=True)
        row, accumulates = longest_row(pairs, sizes, args, layout)
        prediction = require_fit(name, shape, row, setup(dtype, accumulates), room)
        if first:
            print(fit_line(dtype, prediction, room), flush=True)
            if room.gpu and (copies := copies_line(prediction, room.gpu)):
                most = longest_that_fits(row, lambda row: room.fits(estimate(shape, row, setup(dtype, False))))
                print(copies, row_line(args, sizes, most), sep="\n", flush=True)
    if args.weights != "host":
        return load_model(config, args, dtype)
    empty = meta_model(shape, dtype)
    layers = host_bytes(empty)
    slots = SLOTS
    if checks and args.memory_check and room.gpu:
        slots = slots_in(prediction, room)
        print(f"weights: {slots} of {len(layers)} layers are on the GPU at once", flush=True)
    memory = memory_for(layers, args.device)
    model = load_model(config, args, dtype, homes_in(memory, empty))
    stream_weights(model, args.device, memory, slots)
    return model


def streamed_weights(model: nn.Module, args: AMoPOConfig) -> StreamedWeights | None:
    """What moves the weights of a trainer's model, with `weights` host. Raises as `stream_weights`."""
    refuse_in_host_memory(args, adapter=hasattr(model, "peft_config"))
    if args.weights != "host":
        return None
    return streamed_of(model) or stream_weights(model, args.device)

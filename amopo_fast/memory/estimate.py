"""Predicts the peak memory of a training step from a model's configuration; needs no GPU, no weights.

    weights, states      counted from the shapes of a model on the meta device: exact (parameters.py)
    activations, FLOP    from a run on fake tensors (profile.py)
    head                 rows, float32 gradient of the rows and one slice of logits, as amopo_kernels allocates them
    gradients            of all parameters, or what waits for its step inside the backward pass
    states on the host   slots of the largest layer's states on the GPU, all of them in pinned memory
    weights on the host  slots of the largest layer's weights and what is no layer; the layers in pinned memory, and
                         while they are loaded, before there are states, what is no layer and one tensor beside them
    sharding             FSDP2 by layer: a rank's share, two gathered layers, and the embedding and head whole

The peak is the largest of: end of the forward, the head's backward, the last layer's backward (all activations alive),
the first layer's backward (all gradients alive). To that comes RESERVE for the CUDA context, library workspaces and
the allocator's fragmentation. How long a step takes is speed.py's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from amopo_fast.errors import OptionError
from amopo_fast.memory.gpus import GIB
from amopo_fast.memory.parameters import Parameter, Shape, parameters_of, tried
from amopo_fast.memory.profile import BodyProfile, llama_of_widths, meta_model, profile_body
from amopo_fast.memory.work import Work, work_of
from amopo_fast.models import streaming
from amopo_fast.models.architecture import layer_configs
from amopo_fast.models.depth import depth_of
from amopo_fast.optim.host_states import SLOTS, parcel_bytes, slot_bytes
from amopo_fast.optim.states import moment_bytes
from amopo_fast.packing.plan import Layout
from amopo_kernels.head.options import SLICE_LOGITS

RESERVE = 4 * GIB
FILLED = 0.95  # of a GPU's memory, which what nobody asked for may fill
# Of the logits that are alive in the head at a time: columns in `chunked`, which has as many bytes of each as in
# `torch`, float32 and its bfloat16 gradient; `fused` has the gradient alone, of as many as SLICE_LOGITS says.
CHUNKED_COLUMNS, SLICE_BYTES, FUSED_BYTES = 4096, 6, 2
QUANTISED_BYTES = 0.5 + 4 / 64  # per weight: nf4 with a float32 scale per 64
NESTED_QUANTISED_BYTES = 0.5 + (1 + 4 / 256) / 64  # scales in 8 bits, in blocks of 256
MOST_TOKENS = 2**28  # of a row: of more, sizes of tensors do not fit into 64 bits
HOST_PROCESS = 4 * GIB  # of a training process beside tensors, assumed: libraries, CUDA's driver, the data's tokens
CPU_MARGIN = 1.15  # of resident memory over tensors: malloc's fragmentation, the matmul library's workspace
_LOOP_TOKENS = 16  # of each sequence, in the shorter of two runs of a model whose layers loop over tokens
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory is concerned."""

    states: str = "fp32"  # fp32, 8bit, 4bit; bf16: torch's AdamW over bfloat16 weights
    weights: str = "bf16"  # fp32, bf16
    in_backward: bool = False
    host_states: bool = False  # states in pinned host memory
    host_weights: bool = False  # the decoder layers' weights too
    weight_slots: int = streaming.SLOTS  # layers of those that are on the GPU at once
    checkpointing: bool = True
    keep_layers: int = 0
    offload: bool = False
    lora_rank: int | None = None
    quantised: bool = False  # the frozen base model, nf4
    nested: bool = False
    liger: bool = False  # liger-kernel's RMSNorm and SwiGLU
    autocast: bool = True  # matmuls in bfloat16; a CPU's run computes in the weights' dtype
    accumulates: bool = False  # gradients of earlier micro-batches are alive
    gpus: int = 1  # sharded over
    reference: bool = False  # an adapter's objective scores each row without the adapter too, which keeps nothing
    head_slice: int | None = None  # columns, of the torch backend; None: a Triton backend
    head_cache: int = 0  # bytes, at most, of probabilities that a trained head keeps from its forward to its backward

    @property
    def shards(self) -> bool:
        """Whether FSDP can serve it: not the step in backward, quantised models, or this package's own AdamW."""
        own_adamw = self.lora_rank is None and self.weights == "bf16" and self.states == "fp32"
        return not (self.in_backward or self.quantised or own_adamw)

    @property
    def weight_bytes(self) -> int:
        return 4 if self.weights == "fp32" else 2


@dataclass(frozen=True)
class Row:
    """The longest micro-batch: a packed row, or separate rows of one length."""

    tokens: int  # T, computed
    label_tokens: int  # N
    kv_tokens: int  # gathered keys: the sum of all paths' lengths
    sequence_tokens: int = 1024  # length of a sequence, for attention's FLOP
    rows: int = 1  # more of the layout separate


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU at the peak, by part, and of its host's memory; FLOP and work of one micro-batch."""

    parts: dict[str, int]
    pinned: dict[str, int]  # of the host's memory
    unpinned: dict[str, int]
    moment: str  # when the peak is
    flops: int
    forward_flops: int  # of scoring the same pairs without gradient
    work: Work
    streamed: tuple[int, ...]  # bytes of each layer whose weights are in host memory
    whole_cache: int  # by which the peak grows where the head keeps all that it can
    parameters: int
    trained: int

    @property
    def peak(self) -> int:
        """Tensor bytes: what torch.cuda.max_memory_allocated will say."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What the GPU must have."""
        return self.peak + RESERVE

    @property
    def host_pinned(self) -> int:
        return sum(self.pinned.values())

    @property
    def host_needed(self) -> int:
        """What the host must have for each GPU."""
        return self.host_pinned + sum(self.unpinned.values())

    def slots_on(self, memory: int) -> int:
        """Layers whose weights are on a GPU of `memory` bytes at once, with weights in host memory: what is left of
        FILLED of it beside a head that keeps all that it can.

        The more, the less is copied, and the further ahead of the computation.
        """
        beside = self.needed + self.whole_cache - (self.work.weight_slots - streaming.SLOTS) * max(self.streamed)
        return streaming.slots_within(self.streamed, FILLED * (memory // GIB * GIB) - beside)

    @property
    def needed_on_cpu(self) -> int:
        """What a CPU must have free, where host and device are one and the process is already there."""
        return max(int(self.peak * CPU_MARGIN), self.unpinned.get("loading", 0)) + self.host_pinned


def weights_bytes(parameters: tuple[Parameter, ...], setup: Setup) -> int:
    total = 0.0
    for p in parameters:
        if setup.lora_rank is not None and p.trained:
            total += 4 * p.numel  # adapters stay in float32
        elif setup.quantised and p.linear:
            total += p.numel * (NESTED_QUANTISED_BYTES if setup.nested else QUANTISED_BYTES)
        else:
            total += p.numel * setup.weight_bytes
    return int(total)


def gradient_bytes(setup: Setup) -> int:
    """Per trained parameter."""
    return 4 if setup.lora_rank is not None else setup.weight_bytes


@functools.lru_cache(maxsize=32)
def _body(
    shape: Shape, row: Row, dtype: torch.dtype, checkpointing: bool, lora_rank: int | None, liger: bool, autocast: bool
) -> BodyProfile:
    found = tried(shape.config)
    separate = found.choice.layout is Layout.SEPARATE
    length = min(row.sequence_tokens, found.positions or row.sequence_tokens)
    rows = max(row.rows, row.tokens // length) if separate else 1
    attends = any(getattr(layer, "num_attention_heads", None) for layer in layer_configs(shape.config))

    def profile(tokens: int) -> BodyProfile:
        options = dict(rows=rows, dtype=dtype, checkpointing=checkpointing, lora_rank=lora_rank, liger=liger,
                       autocast=autocast)  # fmt: skip
        keys = row.kv_tokens * tokens // row.tokens
        try:
            return profile_body(shape.config, tokens=tokens, kv_tokens=keys, separate=separate,
                                unreached=found.choice.unreached, **options)  # fmt: skip
        except Exception as error:  # what a model's code does of its data's values, fake tensors cannot
            logger.warning("the activations of %s are those of a Llama of its widths: its own code does not run on "
                           "tensors without values (%s)", found.name, type(error).__name__)  # fmt: skip
            return profile_body(llama_of_widths(shape.config), tokens=tokens, kv_tokens=keys, **options | {"rows": 1})

    # Such recurrences loop over tokens in Python: a straight line through two short runs.
    first = rows * _LOOP_TOKENS
    if not separate or (attends and not found.choice.recurrent) or row.tokens <= 2 * first:
        return profile(row.tokens)
    pairs = zip(*(dataclasses.astuple(profile(tokens)) for tokens in (first, 2 * first)), strict=True)
    return BodyProfile(*(two + max(0, two - one) * (row.tokens - 2 * first) // first for one, two in pairs))


def body_of(config: PretrainedConfig, row: Row, setup: Setup, checkpointing: bool) -> BodyProfile:
    # A sharded float32 model is gathered in bfloat16.
    dtype = torch.float32 if setup.weights == "fp32" and setup.gpus == 1 else torch.bfloat16
    return _body(Shape(config), row, dtype, checkpointing, setup.lora_rank, setup.liger, setup.autocast)


@functools.cache
def _streamed(shape: Shape, weights: str) -> tuple[int, ...]:
    """Bytes of each layer that streams."""
    return tuple(streaming.host_bytes(meta_model(shape.config, torch.float32 if weights == "fp32" else torch.bfloat16)))


def cache_bytes(config: PretrainedConfig, row: Row) -> int:
    """Of all probabilities of a row's labels, in bfloat16."""
    return 2 * row.label_tokens * config.get_text_config().vocab_size


def estimate(config: PretrainedConfig, row: Row, setup: Setup) -> Estimate:
    """Predict the peak on one GPU (each of `setup.gpus`).

    Raises:
        ValueError: a configuration that transformers cannot build.
        OptionError: keep_layers above the number of layers, a row of more than `MOST_TOKENS`.
    """
    if row.tokens > MOST_TOKENS:
        raise OptionError(f"a row of {row.tokens:,} tokens: at most {MOST_TOKENS:,} are estimated; lower --tokens, or "
                          "tokens_per_micro_batch and max_length of the run")  # fmt: skip
    text = config.get_text_config()
    parameters = parameters_of(config, setup.lora_rank)
    trained = [p for p in parameters if p.trained]
    gpus = setup.gpus

    weights = weights_bytes(parameters, setup)
    per_gradient = gradient_bytes(setup)
    all_gradients = per_gradient * sum(p.numel for p in trained)
    states = sum(4 * p.numel if setup.states == "bf16" else moment_bytes(p.numel, setup.states) for p in trained)
    pinned, in_layers = {}, sum(p.numel for p in parameters if p.place == "layer")
    streamed = _streamed(Shape(config), setup.weights) if setup.host_weights else ()
    if streamed:
        pinned["weights"] = sum(streamed)
        weights += setup.weight_slots * max(streamed) - sum(streamed)
    if setup.host_states:
        parcels: dict[int | None, list[int]] = {}
        for p in trained:
            parcels.setdefault(p.block, []).append(p.numel)
        pinned["optimizer states"] = sum(parcel_bytes(parcel, setup.states) for parcel in parcels.values())
        states = SLOTS * slot_bytes(list(parcels.values()), setup.states)
    layers = depth_of(text)
    gathered = 0
    if gpus > 1:
        weights, states, all_gradients = (-(-part // gpus) for part in (weights, states, all_gradients))
        outside = sum(p.numel for p in parameters if p.place != "layer")
        # bfloat16: the next layer is gathered while one is used, and the first gradient waits for its reduction
        gathered = 2 * outside + 2 * 2 * (in_layers // layers)
        gathered += 2 * (in_layers // layers) if trained else 0

    body = body_of(config, row, setup, setup.checkpointing)
    kept, backward, body_flops = body.kept, body.backward, body.flops
    if setup.checkpointing and (setup.keep_layers or setup.offload):
        if setup.keep_layers > layers:
            raise OptionError(f"keep_layers={setup.keep_layers}: the model has {layers} layers", "keep_layers")
        if setup.keep_layers:
            whole = body_of(config, row, setup, False)
            kept += setup.keep_layers * (whole.kept_per_layer - body.kept_per_layer)
            # the kept layers' activations are gone before another layer is recomputed
            freed = setup.keep_layers * (whole.kept_per_layer - body.kept_per_layer)
            backward = max(whole.backward, body.backward - freed)
            body_flops -= (body.flops - whole.flops) * setup.keep_layers // layers
        if setup.offload:  # two stay: the one in use and the one on its way
            pinned["activations"] = min(kept, max(0, layers - setup.keep_layers - 2) * body.kept_per_layer)
            kept -= pinned["activations"]
    if setup.quantised:
        backward += 2 * max(p.numel for p in parameters if p.linear)  # one weight, decoded

    hidden, vocabulary = text.hidden_size, text.vocab_size
    rows = row.label_tokens * hidden
    head_trained = any(p.trained and p.place == "head" for p in parameters)
    tied = not any(p.place == "embedding" for p in parameters)
    head_gradient = (setup.weight_bytes if gpus == 1 else 2) * vocabulary * hidden if head_trained else 0
    columns = min(setup.head_slice or CHUNKED_COLUMNS, vocabulary)
    head_working = row.label_tokens * columns * SLICE_BYTES
    if setup.head_slice is None:
        head_working = max(head_working, min(SLICE_LOGITS["fused"], row.label_tokens * vocabulary) * FUSED_BYTES)
    head_working += rows * (2 + 2 + 4)
    probabilities = cache_bytes(config, row) if head_trained else 0
    kept_probabilities = min(setup.head_cache, probabilities)

    if setup.in_backward:
        # the profile holds the layers' gradients until they are stepped; a tied head's waits for the embedding's
        carried, waiting, complete = 0, head_gradient if tied else 0, head_gradient if tied else 0
    elif setup.accumulates or setup.lora_rank is not None:
        carried = waiting = complete = all_gradients
    else:
        # gradients appear while activations go: none at the start of the backward, all at its end
        carried, waiting, complete = 0, head_gradient, all_gradients
    one_layer = body.kept_per_layer if setup.checkpointing else body.kept // max(layers, 1)
    moments = {
        "forward pass": {"gradients": carried, "activations": kept, "working memory": body.forward},
        "backward pass of the head": {
            "gradients": carried if carried else head_gradient,
            "activations": kept,
            "head": head_working + kept_probabilities,
        },
        "backward pass of the last layer": {"gradients": waiting, "activations": kept, "working memory": backward},
        "backward pass of the first layer": {
            "gradients": complete,
            "activations": one_layer,
            "working memory": body.backward,
        },
    }
    moment, dynamic = max(moments.items(), key=lambda item: sum(item[1].values()))
    in_head = sum(moments["backward pass of the head"].values()) + probabilities - kept_probabilities
    parts = {
        "weights": weights,
        "optimizer states": states,
        "gradients": dynamic["gradients"],
        "activations": dynamic["activations"],
        "head": dynamic.get("head", 0),
        "working memory": dynamic.get("working memory", 0) + gathered,
    }
    products = row.label_tokens * vocabulary * hidden
    attention = _attention_flops(text, row)
    recomputed = (layers - setup.keep_layers) / layers if setup.checkpointing else 0
    flops = body_flops + (8 if head_trained else 4) * products + int(attention * (1 + 2.5 + recomputed))
    forward_flops = body.forward_flops + 2 * products + attention
    if setup.reference and setup.lora_rank is not None:
        flops += forward_flops
    work = work_of(
        parameters, layers, setup.states, flops=flops, forward_flops=forward_flops, product=2 * products,
        head_trained=head_trained, recomputed=recomputed, streamed=streamed, weight_slots=setup.weight_slots,
        host_states=setup.host_states, gpus=gpus,
        checkpoint_bytes=body.kept_per_layer if "activations" in pinned else 0,
    )  # fmt: skip
    unpinned = {"process": HOST_PROCESS}
    if streamed:
        outside = setup.weight_bytes * sum(p.numel for p in parameters) - sum(streamed)
        read = (4 + setup.weight_bytes) * max(p.numel for p in parameters)  # a tensor as its file has it, and converted
        unpinned["loading"] = max(0, pinned["weights"] + outside + read - sum(pinned.values()))
    return Estimate(
        parts, pinned, unpinned, moment, flops, forward_flops, work, streamed,
        max(0, in_head - sum(dynamic.values())), sum(p.numel for p in parameters), sum(p.numel for p in trained),
    )  # fmt: skip


def _attention_flops(text: PretrainedConfig, row: Row) -> int:
    """Of the forward, 4 per query, key and channel; a causal query sees half of its sequence. The backward is 2.5 times
    that."""
    channels = 0.0  # of a layer, on average
    for layer in (configs := layer_configs(text)):
        heads = getattr(layer, "num_attention_heads", None) or 0
        width = getattr(layer, "head_dim", None) or layer.hidden_size // max(heads, 1)
        channels += heads * width / len(configs)
    return int(4 * row.tokens * (row.sequence_tokens / 2) * channels * depth_of(text))

"""Predicts the peak memory and the speed of a training step from a model's configuration; needs no GPU, no weights.

    weights, states      counted from the shapes of a model on the meta device: exact
    activations, FLOP    from a run on fake tensors (profile.py)
    head                 rows, float32 gradient of the rows and one slice of logits, as amopo_kernels allocates them
    gradients            of all parameters, or what waits for its step inside the backward pass
    states on the host   slots of the largest layer's states on the GPU, all of them in pinned memory
    sharding             FSDP2 by layer: a rank's share, two gathered layers, and the embedding and head whole

The peak is the largest of: end of the forward, the head's backward, the last layer's backward (all activations alive),
the first layer's backward (all gradients alive). To that comes RESERVE for the CUDA context, library workspaces and
the allocator's fragmentation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from amopo_fast.errors import OptionError
from amopo_fast.memory.profile import BodyProfile, llama_of_widths, meta_model, profile_body
from amopo_fast.models import streaming
from amopo_fast.models.architecture import decoder_of, language_model_of, layer_configs, positions_of
from amopo_fast.models.check import choose_layout
from amopo_fast.models.depth import depth_of
from amopo_fast.optim.host_states import SLOTS, blocks_of, parcel_bytes, slot_bytes
from amopo_fast.optim.states import moment_bytes
from amopo_fast.packing.plan import Layout

GIB = 2**30
RESERVE = 4 * GIB
HEAD_SLICE = 4096  # columns of logits alive in the head at a time, in the Triton backends
HEAD_SLICE_BYTES = 6  # per logit: float32 and its bfloat16 gradient
QUANTISED_BYTES = 0.5 + 4 / 64  # per weight: nf4 with a float32 scale per 64
NESTED_QUANTISED_BYTES = 0.5 + (1 + 4 / 256) / 64  # scales in 8 bits, in blocks of 256
# Assumed, and printed as such: no run of this project has been timed on a GPU yet. 0.4 of the dense peak is what
# well-tuned trainers report for dense models of this size.
EFFICIENCY = 0.40
_LOOP_TOKENS = 16  # of each sequence, in the shorter of two runs of a model whose layers loop over tokens
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that a process can allocate, context included. flops: dense bfloat16 peak (data sheet)."""

    name: str
    memory: int
    flops: float


GPUS = {
    name: Gpu(name, int(gib * GIB), tflops * 1e12)
    for name, gib, tflops in (
        ("b200", 178.0, 2250),
        ("h200", 139.0, 989),
        ("h100", 79.0, 989),
        ("a100-80", 79.0, 312),
        ("a100-40", 39.4, 312),
        ("l40s", 44.4, 362),
        ("4090", 23.5, 165),
    )
}


def parse_gpu(text: str) -> Gpu:
    """A name of GPUS, or a number of GiB (then without a known speed).

    Raises:
        OptionError: neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text.lower().removesuffix("gib").removesuffix("gb"))
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**20:  # NaN too
        raise OptionError(f"--gpu {text}: give GiB or one of {', '.join(GPUS)}", "gpu")
    return Gpu(f"{gib:g} GiB", int(gib * GIB), 0.0)


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
    accumulates: bool = False  # gradients of earlier micro-batches are alive
    gpus: int = 1  # sharded over
    reference: bool = False  # an adapter's objective scores each row without the adapter too, which keeps nothing
    head_slice: int = HEAD_SLICE
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
    """Bytes on one GPU at the peak, by part, and of its host's memory; FLOP of one micro-batch."""

    parts: dict[str, int]
    host: dict[str, int]  # pinned
    moment: str  # when the peak is
    flops: int
    forward_flops: int  # of scoring the same pairs without gradient
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
    def host_needed(self) -> int:
        """Pinned bytes of host memory."""
        return sum(self.host.values())

    @property
    def transfer(self) -> int:
        """Bytes that a step moves from the host to the GPU, and again back."""
        return self.host.get("optimizer states", 0)


@dataclass(frozen=True)
class _Parameter:
    numel: int
    trained: bool
    place: str  # layer, head (embedding too where tied), embedding, other
    linear: bool  # would be quantised
    block: int | None  # of the parameters whose states travel together, where it is trained


class _Shape:
    """A configuration that can be a cache's key."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._text = config.to_json_string(use_diff=False)

    def __eq__(self, other) -> bool:
        return isinstance(other, _Shape) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(maxsize=8)
def _parameters_of(shape: _Shape, lora_rank: int | None) -> tuple[_Parameter, ...]:
    model = meta_model(shape.config, torch.bfloat16, lora_rank)
    base = language_model_of(model)
    in_text = {id(parameter) for parameter in decoder_of(base).parameters()}
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head}
    block_of = {id(parameter): number for number, block in enumerate(blocks_of(model)) for parameter in block}
    result = []
    for name, parameter in model.named_parameters():
        place = "other"
        if parameter is head:
            place = "head"
        elif parameter is embedding:
            place = "embedding"
        elif id(parameter) in in_text and (".layers." in name or ".h." in name):
            place = "layer"
        result.append(_Parameter(parameter.numel(), parameter.requires_grad, place, id(parameter) in linear,
                                 block_of.get(id(parameter))))  # fmt: skip
    return tuple(result)


def parameters_of(config: PretrainedConfig, lora_rank: int | None = None) -> tuple[_Parameter, ...]:
    """Every parameter once, tied ones too, with an adapter's."""
    return _parameters_of(_Shape(config), lora_rank)


def weights_bytes(parameters, setup: Setup) -> int:
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
    shape: _Shape, row: Row, dtype: torch.dtype, checkpointing: bool, lora_rank: int | None, liger: bool
) -> BodyProfile:
    model = meta_model(shape.config)
    choice = choose_layout(model)
    separate = choice.layout is Layout.SEPARATE
    length = min(row.sequence_tokens, positions_of(model) or row.sequence_tokens)
    rows = max(row.rows, row.tokens // length) if separate else 1
    attends = any(getattr(layer, "num_attention_heads", None) for layer in layer_configs(shape.config))

    def profile(tokens: int) -> BodyProfile:
        options = dict(rows=rows, dtype=dtype, checkpointing=checkpointing, lora_rank=lora_rank, liger=liger)
        keys = row.kv_tokens * tokens // row.tokens
        try:
            return profile_body(shape.config, tokens=tokens, kv_tokens=keys, separate=separate, **options)
        except Exception as error:  # what a model's code does of its data's values, fake tensors cannot
            logger.warning("the activations of %s are those of a Llama of its widths: its own code does not run on "
                           "tensors without values (%s)", type(model).__name__, type(error).__name__)  # fmt: skip
            return profile_body(llama_of_widths(shape.config), tokens=tokens, kv_tokens=keys, **options | {"rows": 1})

    # Such recurrences loop over tokens in Python: a straight line through two short runs.
    first = rows * _LOOP_TOKENS
    if not separate or (attends and not choice.recurrent) or row.tokens <= 2 * first:
        return profile(row.tokens)
    pairs = zip(*(dataclasses.astuple(profile(tokens)) for tokens in (first, 2 * first)), strict=True)
    return BodyProfile(*(two + max(0, two - one) * (row.tokens - 2 * first) // first for one, two in pairs))


def body_of(config: PretrainedConfig, row: Row, setup: Setup, checkpointing: bool) -> BodyProfile:
    # A sharded float32 model is gathered in bfloat16.
    dtype = torch.float32 if setup.weights == "fp32" and setup.gpus == 1 else torch.bfloat16
    return _body(_Shape(config), row, dtype, checkpointing, setup.lora_rank, setup.liger)


@functools.cache
def _streamed(shape: _Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the layers that stream, on the host, and of the largest, which is that of a slot on the device."""
    sizes = streaming.host_bytes(meta_model(shape.config, dtype))
    return sum(sizes), max(sizes)


def cache_bytes(config: PretrainedConfig, row: Row) -> int:
    """Of all probabilities of a row's labels, in bfloat16."""
    return 2 * row.label_tokens * config.get_text_config().vocab_size


def estimate(config: PretrainedConfig, row: Row, setup: Setup) -> Estimate:
    """Predict the peak on one GPU (each of `setup.gpus`).

    Raises:
        ValueError: a configuration that transformers cannot build. OptionError: keep_layers above the number of layers.
    """
    text = config.get_text_config()
    parameters = parameters_of(config, setup.lora_rank)
    trained = [p for p in parameters if p.trained]
    gpus = setup.gpus

    weights = weights_bytes(parameters, setup)
    per_gradient = gradient_bytes(setup)
    all_gradients = per_gradient * sum(p.numel for p in trained)
    host = {}
    if setup.host_weights:
        host["weights"], slot = _streamed(_Shape(config), torch.float32 if setup.weights == "fp32" else torch.bfloat16)
        weights += setup.weight_slots * slot - host["weights"]
    states = sum(4 * p.numel if setup.states == "bf16" else moment_bytes(p.numel, setup.states) for p in trained)
    if setup.host_states:
        blocks: dict[int | None, list[int]] = {}
        for p in trained:
            blocks.setdefault(p.block, []).append(p.numel)
        host["optimizer states"] = sum(parcel_bytes(block, setup.states) for block in blocks.values())
        states = SLOTS * slot_bytes(list(blocks.values()), setup.states)
    in_layers = sum(p.numel for p in parameters if p.place == "layer")
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
            kept -= max(0, layers - setup.keep_layers - 2) * body.kept_per_layer
    if setup.quantised:
        backward += 2 * max(p.numel for p in parameters if p.linear)  # one weight, decoded

    hidden, vocabulary = text.hidden_size, text.vocab_size
    rows = row.label_tokens * hidden
    head_trained = any(p.trained and p.place == "head" for p in parameters)
    tied = not any(p.place == "embedding" for p in parameters)
    head_gradient = (setup.weight_bytes if gpus == 1 else 2) * vocabulary * hidden if head_trained else 0
    head_working = row.label_tokens * min(setup.head_slice, vocabulary) * HEAD_SLICE_BYTES + rows * (2 + 2 + 4)
    head_working += min(setup.head_cache, cache_bytes(config, row)) if head_trained else 0

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
            "head": head_working,
        },
        "backward pass of the last layer": {"gradients": waiting, "activations": kept, "working memory": backward},
        "backward pass of the first layer": {
            "gradients": complete,
            "activations": one_layer,
            "working memory": body.backward,
        },
    }
    moment, dynamic = max(moments.items(), key=lambda item: sum(item[1].values()))
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
    return Estimate(
        parts, host, moment, flops, forward_flops,
        sum(p.numel for p in parameters), sum(p.numel for p in trained),
    )  # fmt: skip


def _attention_flops(text: PretrainedConfig, row: Row) -> int:
    """Of the forward, 4 per query, key and channel; a causal query sees half of its sequence. The backward is 2.5 times
    that."""
    channels = 0.0  # of a layer, on average
    for layer in (configs := layer_configs(text)):
        heads = getattr(layer, "num_attention_heads", None) or 0
        width = getattr(layer, "head_dim", None) or layer.hidden_size // max(heads, 1)
        channels += heads * width / len(configs)
    return int(4 * row.tokens * (row.sequence_tokens / 2) * channels * text.num_hidden_layers)


def tokens_per_second(prediction: Estimate, row: Row, gpu: Gpu, gpus: int = 1, efficiency: float = EFFICIENCY) -> float:
    """Computed tokens/s over all GPUs, each with a micro-batch of its own; 0.0 if the GPU's peak is not known."""
    return gpus * row.tokens * gpu.flops * efficiency / prediction.flops

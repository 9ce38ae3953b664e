"""Activation memory and FLOP of a model's training step, from its configuration alone, by running it on fake tensors.

A model of the same shape with few layers, and with a period of its kinds more, goes through forward and backward
in FakeTensorMode: every operation that transformers would run is run, no byte is allocated.
A dispatch mode counts the storages that are alive.
Both numbers grow by a constant per period, so the rest is a straight line. What kernels replace on a GPU is replaced by
functions that allocate and keep the same: variable-length attention, and with `liger` its RMSNorm and SwiGLU. The head
is not run (estimate.py adds it).
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, PretrainedConfig
from transformers.integrations.moe import ExpertsInterface

from amopo_fast.models.architecture import decoder_of, language_model_of, layer_configs
from amopo_fast.models.depth import depth_of, period_of, set_layers
from amopo_fast.models.faster_layers import without_liger
from amopo_fast.models.text_part import auto_class, freeze_beside_text, linear_layers
from amopo_kernels.head.operators import IMPLEMENTATIONS

ATTENTION = EXPERTS = "amopo_profile"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is active, `live` now and `peak` so far, and matmul `flops`."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in existing:  # views of them are no new memory
            self._seen[tensor.untyped_storage()] = 0

    def include(self, tensors) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("amopo_kernels::")
        if name in IMPLEMENTATIONS and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            with self:  # its slices of logits count
                out = IMPLEMENTATIONS[name](*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        self.include(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class BodyProfile:
    """One forward and backward of a decoder without its head. Bytes; parameters' gradients are freed as they appear."""

    kept: int  # alive between forward and backward
    forward: int  # peak of the forward above `kept`
    backward: int  # peak of the backward above `kept`
    flops: int  # matmuls of forward, recomputation and backward; attention not counted
    kept_per_layer: int
    forward_flops: int  # of `flops`, the forward's


class _Attention(torch.autograd.Function):
    """Allocates and keeps what packed variable-length attention does; computes nothing.

    query (T, Hq, D), key (T, Hkv, D) and value (T, Hkv, Dv), gathered to `kv_tokens` rows.
    """

    @staticmethod
    def forward(ctx, query, key, value, kv_tokens):
        key_rows = key.new_empty(kv_tokens, *key.shape[1:])
        value_rows = value.new_empty(kv_tokens, *value.shape[1:])
        out = query.new_empty(*query.shape[:2], value.shape[2])
        lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key_rows, value_rows, out, lse)
        ctx.rows = key.shape[0]
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        # the gradient of shared keys and values is a sum in float32
        sums = [torch.zeros(ctx.rows, *d.shape[1:], dtype=torch.float32, device=d.device) for d in (d_key, d_value)]
        return d_query, sums[0].to(key.dtype), sums[1].to(value.dtype), None


def _attention(module, query, key, value, attention_mask, profile_kv_tokens=None, **kwargs):
    # (R, heads, L, D) -> (R * L, heads, D)
    rows = [x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value)]
    return _Attention.apply(*rows, profile_kv_tokens).unflatten(0, (query.shape[0], query.shape[2])), None


def _use_packed(model: nn.Module, kv_tokens: int) -> dict[str, int]:
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(ATTENTION)
    return {"profile_kv_tokens": kv_tokens}


def _experts(self, hidden_states, top_k_index, top_k_weights):
    """Rows sorted by expert and multiplied in groups: the same sizes and FLOP with one expert's weights for all.

    transformers' grouped product, which autocast leaves alone, does not take every dtype and width on fake tensors.
    """
    chosen, count = top_k_index.shape[-1], hidden_states.shape[0]
    order = torch.sort(top_k_index.reshape(-1)).indices
    rows = hidden_states[order // chosen]

    def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)[0]
        with torch.autocast("cpu", enabled=False):
            out = rows.to(weight.dtype) @ (weight if self.is_transposed else weight.T)
        return out + getattr(self, f"{name}_bias")[0] if self.has_bias else out

    inner = linear(rows, "gate_up_proj" if self.has_gate else "up_proj")
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = linear(inner, "down_proj") * top_k_weights.reshape(-1)[order, None]
    return out[torch.argsort(order)].view(count, chosen, -1).sum(1).to(hidden_states.dtype)


class _RMSNorm(torch.autograd.Function):
    """Liger's: keeps its input and a float32 scale per row; the gradient is written over the incoming one."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        _, weight, _ = ctx.saved_tensors
        return grad, torch.empty_like(weight)


class _GatedProduct(torch.autograd.Function):
    """Liger's SwiGLU and GEGLU: keeps both factors; their gradients are written over them."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


def _use_liger(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(lambda m, x: _RMSNorm.apply(x, m.weight), module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = functools.partial(
                lambda m, x: m.down_proj(_GatedProduct.apply(m.gate_proj(x), m.up_proj(x))), module
            )


def meta_model(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int | None = None,
    unreached: frozenset[str] = frozenset(),
) -> nn.Module:
    """A causal LM of `config` without memory; with an adapter over `linear_layers` if a rank is given.

    unreached: `Choice.unreached`, which training freezes, and lays no adapter on, beside what lies beside the text.
    """
    config = copy.deepcopy(config)  # transformers writes the dtype into it, and another dtype is another cache's key
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        if lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(r=lora_rank, target_modules=linear_layers(model, unreached), task_type="CAUSAL_LM")
            model = get_peft_model(model, adapter)
    freeze_beside_text(model, unreached)
    return model


ExpertsInterface.register(EXPERTS, _experts)


def _make_fake(model: nn.Module) -> None:
    """Turn meta tensors into fake CPU tensors, which autocast and dtype rules take for real ones; keeps ties."""
    made = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                table[name] = made[id(tensor)]


@without_liger()
def profile_body(
    config: PretrainedConfig,
    *,
    tokens: int,
    kv_tokens: int,
    rows: int = 1,
    separate: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    lora_rank: int | None = None,
    liger: bool = False,
    autocast: bool = True,
    unreached: frozenset[str] = frozenset(),
) -> BodyProfile:
    """Memory and FLOP of the body's forward and backward over a packed row.

    Args:
        config: of a causal LM.
        tokens: T of the row. kv_tokens: rows of the gathered keys, the sum of all paths' lengths.
        separate: the layout separate, whose attention is the model's own; rows: into which the tokens are split there.
        dtype: of the weights. autocast: matmuls are in bfloat16 by it, or in the weights' dtype.
        checkpointing: of every layer, where the model can.
        lora_rank: train only an adapter of this rank on all linear layers.
        liger: with liger-kernel's RMSNorm and SwiGLU.
        unreached: see `meta_model`.

    Raises:
        ValueError: a configuration that transformers does not build.
    """
    text = config.get_text_config()
    layers = depth_of(text)
    first, period = period_of(text)

    def run(depth: int) -> tuple[int, int, int, int, int]:
        changed = copy.deepcopy(config)
        if depth != layers:
            set_layers(changed, depth)
        shape = (rows, tokens // rows)
        model = meta_model(changed, dtype, lora_rank, unreached).train()
        return _run(model, shape, None if separate else kv_tokens, checkpointing, liger, autocast)

    low = first + period * max(1, -(-(2 - first) // max(period, 1)))  # two layers at least
    if not period or low + period > layers:  # nothing repeats: all of them
        kept, forward, backward, *flops = run(layers)
        return BodyProfile(kept, forward - kept, backward - kept, flops[0], kept // layers, flops[1])
    one, two = run(low), run(low + period)
    kept, forward, backward, *flops = (a + (layers - low) * (b - a) // period for a, b in zip(one, two, strict=True))
    # What is alive between the passes is alive at their peaks: where the line falls below, another layer's peak led.
    forward, backward = max(forward - kept, 0), max(backward - kept, 0)
    return BodyProfile(kept, forward, backward, flops[0], (two[0] - one[0]) // period, flops[1])


def llama_of_widths(config: PretrainedConfig) -> LlamaConfig:
    """A dense model with the widths of a configuration's text model, of its chosen experts together."""
    text, layer = config.get_text_config(), layer_configs(config)[0]

    def first(*names: str, default: int) -> int:
        found = (getattr(layer, name, None) for name in names)
        return next((value for value in found if isinstance(value, int) and value), default)

    heads = math.gcd(first("num_attention_heads", default=1), text.hidden_size)  # a Llama's divide its width
    chosen = first("num_experts_per_tok", "moe_topk", default=1)
    dense = first("intermediate_size", "ffn_hidden_size", default=4 * text.hidden_size)
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(first("num_key_value_heads", default=heads), heads),
        head_dim=first("head_dim", "kv_channels", default=text.hidden_size // heads),
        intermediate_size=chosen * first("moe_intermediate_size", "expert_ffn_hidden_size", default=dense),
    )


def _run(
    model: nn.Module, shape: tuple[int, int], kv_tokens: int | None, checkpointing: bool, liger: bool, autocast: bool
) -> tuple[int, int, int, int, int]:
    """(bytes alive after the forward, peak of the forward, peak of the backward, FLOP, FLOP of the forward)"""
    base = language_model_of(model)
    options = _use_packed(base, kv_tokens) if kv_tokens is not None else {}
    base.set_experts_implementation(EXPERTS)
    if checkpointing and base.supports_gradient_checkpointing:
        (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
    if liger:
        _use_liger(base)
    with FakeTensorMode():
        _make_fake(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        ids = torch.zeros(shape, dtype=torch.long)
        if options:
            options["position_ids"] = ids
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                hidden = decoder_of(base)(input_ids=ids, use_cache=False, **options).last_hidden_state
            kept, forward, forward_flops = live.live, live.peak, live.flops
            live.peak = kept
            hidden.backward(torch.ones_like(hidden))
        return kept, forward, live.peak, live.flops, forward_flops


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None

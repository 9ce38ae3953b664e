"""Activation memory and FLOP of a model's training step, from its configuration alone, by running it on fake tensors.

A model of the same shape with two and with three layers goes through forward and backward in FakeTensorMode: every
operation that transformers would run is run, no byte is allocated. A dispatch mode counts the storages that are alive.
Both numbers grow by a constant per layer, so the rest is a straight line. What kernels replace on a GPU is replaced by
functions that allocate and keep the same: variable-length attention, and with `liger` its RMSNorm and SwiGLU. The head
is not run (estimate.py adds it).
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from amopo_fast.models.architecture import set_layers

ATTENTION = "amopo_profile"
LORA_MODULES = "all-linear"


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


class _Attention(torch.autograd.Function):
    """Allocates and keeps what packed variable-length attention does; computes nothing.

    query (T, Hq, D), key and value (T, Hkv, D), gathered to `kv_tokens` rows.
    """

    @staticmethod
    def forward(ctx, query, key, value, kv_tokens):
        key_rows = key.new_empty(kv_tokens, *key.shape[1:])
        value_rows = value.new_empty(kv_tokens, *value.shape[1:])
        out = torch.empty_like(query)
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


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    set_layers(config, layers)
    return config


def meta_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, lora_rank: int | None = None
) -> nn.Module:
    """A causal LM of `config` without memory; with an adapter over all linear layers if a rank is given."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(r=lora_rank, target_modules=LORA_MODULES, task_type="CAUSAL_LM")
            model = get_peft_model(model, adapter)
    return model


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


def profile_body(
    config: PretrainedConfig,
    *,
    tokens: int,
    kv_tokens: int,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    lora_rank: int | None = None,
    liger: bool = False,
) -> BodyProfile:
    """Memory and FLOP of the body's forward and backward over a packed row.

    Args:
        config: of a causal LM.
        tokens: T of the row. kv_tokens: rows of the gathered keys, the sum of all paths' lengths. rows: into which the
            tokens are split, in the layout separate.
        dtype: of the weights; matmuls are in bfloat16 by autocast.
        checkpointing: of every layer.
        lora_rank: train only an adapter of this rank on all linear layers.
        liger: with liger-kernel's RMSNorm and SwiGLU.

    Raises:
        ValueError: a configuration that AutoModelForCausalLM does not build.
    """
    layers = config.get_text_config().num_hidden_layers
    two, three = (
        _run(_with_layers(config, n), (rows, tokens // rows), kv_tokens, dtype, checkpointing, lora_rank, liger)
        for n in (2, 3)
    )
    kept, forward, backward, flops = (a + (layers - 2) * (b - a) for a, b in zip(two, three, strict=True))
    return BodyProfile(kept, forward - kept, backward - kept, flops, three[0] - two[0])


def _run(config, shape, kv_tokens, dtype, checkpointing, lora_rank, liger) -> tuple[int, int, int, int]:
    """(bytes alive after the forward, peak of the forward, peak of the backward, FLOP)"""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    model = meta_model(config, dtype, lora_rank).train()
    base = model if lora_rank is None else model.get_base_model()
    base.set_attn_implementation(ATTENTION)
    if checkpointing:
        (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
    if liger:
        _use_liger(base)
    with FakeTensorMode():
        _make_fake(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        ids = torch.zeros(shape, dtype=torch.long)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                hidden = base.get_decoder()(
                    input_ids=ids, position_ids=ids, use_cache=False, profile_kv_tokens=kv_tokens
                ).last_hidden_state
            kept, forward = live.live, live.peak
            live.peak = kept
            hidden.backward(torch.ones_like(hidden))
        return kept, forward, live.peak, live.flops


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None

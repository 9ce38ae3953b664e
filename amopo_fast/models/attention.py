"""Attention over a packed row, plugged into transformers through its public attention interface.

`switch_attention(model)` sets the model's implementation to "amopo_packed" (or "amopo_packed_eager", for a model that
ran "eager"). Until a plan is active, that behaves as the implementation before. Under `packed_attention(plan)` each
trie node's queries attend to the gathered keys and values of the path root..node, causal and aligned bottom-right.
Nothing of size T x T is made.

The plan's tensors travel as integer keyword arguments of `model(...)`: gradient checkpointing, PEFT and FSDP2 hand
them to the attention function unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from amopo_fast.models.attention_backends import attend
from amopo_fast.packing.plan import Plan
from amopo_kernels import gather_rows

NAME = "amopo_packed"
_EAGER = f"{NAME}_eager"
_plan_active: ContextVar[bool] = ContextVar("amopo_packed_plan_active", default=False)


@contextmanager
def packed_attention(plan: Plan, backend: str) -> Iterator[dict[str, torch.Tensor | int | str]]:
    """While open, the mask is left out; yields the keyword arguments that `model(...)` must get."""
    token = _plan_active.set(True)
    try:
        yield {
            "packed_cu_seqlens_q": plan.cu_seqlens_q,
            "packed_cu_seqlens_k": plan.cu_seqlens_k,
            "packed_kv_indices": plan.kv_indices,
            "packed_kv_order": plan.kv_order,
            "packed_kv_offsets": plan.kv_offsets,
            "packed_max_seqlen_q": plan.max_seqlen_q,
            "packed_max_seqlen_k": plan.max_seqlen_k,
            "packed_backend": backend,
        }
    finally:
        _plan_active.reset(token)


def switch_attention(model: nn.Module) -> None:
    """Give a transformers model the packed implementation, in place, and keep how it runs without a plan.

    A model loaded with a flash implementation runs padded batches with "sdpa" (or "eager" where it has no SDPA) from
    here on; `model.set_attn_implementation` switches back.
    """
    AttentionInterface.register(NAME, _packed_or_sdpa)
    AttentionInterface.register(_EAGER, _packed_or_eager)
    AttentionMaskInterface.register(NAME, _mask_or_sdpa)
    AttentionMaskInterface.register(_EAGER, _mask_or_eager)
    before = model.config._attn_implementation
    if not is_switched(model):
        eager = before == "eager" or not getattr(model, "_supports_sdpa", True)
        model.set_attn_implementation(_EAGER if eager else NAME)


def is_switched(model: nn.Module) -> bool:
    """Whether the model's attention takes plans."""
    return model.config.get_text_config()._attn_implementation in (NAME, _EAGER)


# Runs outside compiled graphs: segment lengths are data, and a layer compiled around it is the same for every plan.
@torch.compiler.disable
def _packed(module, query, key, value, scaling, dropout, sliding_window, softcap, s_aux, plan) -> torch.Tensor:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, Dv)."""
    if query.shape[0] != 1:
        raise ValueError(f"a packed row has batch size 1, got {query.shape[0]}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast RoPE and norms may hand over float32; the projections that made value say the dtype.
    dtype = value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    if plan["packed_kv_indices"].shape[0] != q.shape[0]:  # otherwise nothing is shared: the row is its own keys
        indices, order, offsets = (plan[f"packed_kv_{name}"] for name in ("indices", "order", "offsets"))
        k, v = (gather_rows(x, indices, order, offsets, validate=False) for x in (k, v))
    return attend(
        plan["packed_backend"],
        q,
        k,
        v,
        plan["packed_cu_seqlens_q"],
        plan["packed_cu_seqlens_k"],
        plan["packed_max_seqlen_q"],
        plan["packed_max_seqlen_k"],
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    ).unsqueeze(0)


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    fallback,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    plan = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("packed_")}
    if plan:
        return _packed(module, query, key, value, scaling, dropout, sliding_window, softcap, s_aux, plan), None
    if _plan_active.get():
        raise RuntimeError(
            f"{type(module).__name__} did not get the plan: its model does not hand keyword arguments to the "
            "attention function, so a packed row would mix its sequences"
        )
    options = {"softcap": softcap, "s_aux": s_aux}  # not every eager function takes them
    kwargs.update({name: value for name, value in options.items() if value is not None})
    return fallback(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        sliding_window=sliding_window,
        **kwargs,
    )


def _packed_or_sdpa(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention interface; without a plan this is "sdpa"."""
    return _attention(module, query, key, value, attention_mask, sdpa_attention_forward, **kwargs)


def _packed_or_eager(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention interface; without a plan this is the eager function of the model's own file."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return _attention(module, query, key, value, attention_mask, eager, **kwargs)


def _mask_or_sdpa(*args, **kwargs) -> torch.Tensor | None:
    return None if _plan_active.get() else sdpa_mask(*args, **kwargs)


def _mask_or_eager(*args, **kwargs) -> torch.Tensor | None:
    return None if _plan_active.get() else eager_mask(*args, **kwargs)

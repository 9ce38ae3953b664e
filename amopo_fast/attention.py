"""Attention over a packed row, plugged into transformers through its public attention interface.

`register()` makes the implementation "amopo_packed" known. A model switched to it (`model.set_attn_implementation`)
behaves as with "sdpa" until a plan is active; under `packed_attention(plan)` each trie node's queries attend to the
gathered keys and values of the path root..node, causal and aligned bottom-right. Nothing of size T x T is made.

The plan's tensors travel as integer keyword arguments of `model(...)`: gradient checkpointing, PEFT and FSDP2 hand
them to the attention function unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from amopo_fast.plan import Plan

NAME = "amopo_packed"
_plan_active: ContextVar[bool] = ContextVar("amopo_packed_plan_active", default=False)


@contextmanager
def packed_attention(plan: Plan) -> Iterator[dict[str, torch.Tensor | int]]:
    """While open, the mask is left out; yields the keyword arguments that `model(...)` must get."""
    token = _plan_active.set(True)
    try:
        yield {
            "packed_cu_seqlens_q": plan.cu_seqlens_q,
            "packed_cu_seqlens_k": plan.cu_seqlens_k,
            "packed_kv_indices": plan.kv_indices,
            "packed_max_seqlen_q": plan.max_seqlen_q,
            "packed_max_seqlen_k": plan.max_seqlen_k,
        }
    finally:
        _plan_active.reset(token)


class _GatherRows(torch.autograd.Function):
    """x[indices] over the first axis; the gradient of a repeated row is summed in float32."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (indices,) = ctx.saved_tensors
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=accumulate, device=grad.device)
        return total.index_add_(0, indices, grad.to(accumulate)).to(grad.dtype), None


def _segment_mask(q_len: int, k_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(q_len, k_len) bool: query i sits at position k_len - q_len + i of its path."""
    query = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _sdpa_segments(query, key, value, cu_q, cu_k, scaling, dropout, window, softcap):
    """query (T, H, D), key and value (Tk, Hkv, D) gathered per path -> (T, H, D)."""
    out = []
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, heads, rows, D)
    groups = query.shape[1] // key.shape[1]
    # split, not slices: the backward of each slice would fill a whole row's gradient with zeros
    segments = zip(query.split(lengths_q, 2), key.split(lengths_k, 2), value.split(lengths_k, 2), strict=True)
    for q, k, v in segments:
        q_len, k_len = q.shape[2], k.shape[2]
        windowed = window is not None and k_len > window
        if softcap is not None:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap)) * softcap
            mask = _segment_mask(q_len, k_len, window if windowed else None, q.device)
            weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
            out.append(F.dropout(weights, dropout) @ v)
            continue
        plain = q_len == k_len and not windowed
        out.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if plain else _segment_mask(q_len, k_len, window if windowed else None, q.device),
                is_causal=plain,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=groups > 1,
            )
        )
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_cu_seqlens_q: torch.Tensor | None = None,
    packed_cu_seqlens_k: torch.Tensor | None = None,
    packed_kv_indices: torch.Tensor | None = None,
    packed_max_seqlen_q: int | None = None,
    packed_max_seqlen_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, Hkv, T, D) -> ((1, T, H, D), None).

    Without a plan's keyword arguments this is transformers' "sdpa".
    """
    if packed_kv_indices is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            **kwargs,
        )
    if query.shape[0] != 1:
        raise ValueError(f"a packed row has batch size 1, got {query.shape[0]}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    k, v = (_GatherRows.apply(x, packed_kv_indices) for x in (k, v))
    out = _sdpa_segments(q, k, v, packed_cu_seqlens_q, packed_cu_seqlens_k, scaling, dropout, sliding_window, softcap)
    return out.unsqueeze(0), None


def packed_mask(*args, **kwargs) -> torch.Tensor | None:
    """No mask while a plan is active, else that of "sdpa": padded batches and generate() keep working."""
    return None if _plan_active.get() else sdpa_mask(*args, **kwargs)


def register() -> str:
    """Make "amopo_packed" known to transformers (any number of times) and return the name."""
    AttentionInterface.register(NAME, packed_attention_forward)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME

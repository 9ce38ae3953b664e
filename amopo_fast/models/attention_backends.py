"""Bottom-right-aligned causal attention over segments of a packed row, by whichever library is there.

All backends compute the same function of q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) and two arrays of offsets: the
queries cu_q[b]:cu_q[b+1] sit at the end of the keys cu_k[b]:cu_k[b+1]. None makes anything of size T x T.

| name | library | refuses |
|---|---|---|
| flash_attention_4 | flash-attn-4 through transformers | softcap, window, dropout, head dims > 128, GPUs before sm_90 |
| flash_attention_3 | flash-attn-3 through transformers | dropout, head dims above 256, GPUs other than sm_8x, sm_90 |
| flash_attention_2 | flash-attn through transformers | head dims above 256, GPUs before sm_80 |
| varlen | torch.nn.attention.varlen | softcap, dropout, head dims above 256, GPUs before sm_80 |
| sdpa | torch, one call per segment | nothing |

All but sdpa need CUDA, bf16 or fp16 and a head dim that 8 divides, and refuse attention sinks.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import utils as transformers_utils
from transformers.modeling_flash_attention_utils import _flash_attention_forward

logger = logging.getLogger(__name__)

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
BACKENDS = (*FLASH, "varlen", "sdpa")  # in the order of "auto"


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of a backend; one per (model, device, dtype)."""

    device: str  # torch.device.type
    capability: tuple[int, int] | None  # of the CUDA device
    dtype: torch.dtype  # of q, k and v
    head_dim: int  # the larger one of q's and v's
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    sinks: bool = False


def _installed(backend: str) -> bool:
    if backend in FLASH:
        available = getattr(transformers_utils, f"is_flash_attn_{backend[-1]}_available", None)
        return available is not None and bool(available())
    return True


def _lacks(backend: str, needs: AttentionNeeds) -> str | None:
    """What of `needs` the backend does not have, in words."""
    if backend == "sdpa":
        return None
    if needs.device != "cuda":
        return f"it needs CUDA tensors, these are on {needs.device!r}"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16 only, not {needs.dtype} (use bf16=True)"
    least = (9, 0) if backend == "flash_attention_4" else (8, 0)
    if needs.capability < least:
        return f"it needs compute capability {least[0]}.{least[1]}, the GPU has {needs.capability}"
    if backend == "flash_attention_3" and needs.capability >= (10, 0):
        return f"it has no kernels for compute capability {needs.capability}"
    if needs.head_dim % 8:
        return f"head dim {needs.head_dim} is not a multiple of 8"
    limit = 128 if backend == "flash_attention_4" else 256
    if needs.head_dim > limit:
        return f"head dim {needs.head_dim} is above {limit}"
    missing = {
        "flash_attention_4": ("window", "softcap", "dropout"),
        "flash_attention_3": ("dropout",),
        "flash_attention_2": (),
        "varlen": ("softcap", "dropout"),
    }[backend]
    words = {"window": "sliding windows", "softcap": "softcap", "dropout": "attention dropout"}
    for need in missing:
        if getattr(needs, need):
            return f"it has no {words[need]}"
    return "it has no attention sinks" if needs.sinks else None


@functools.cache  # once per kind of model, and so one line in the log
def choose_backend(requested: str, needs: AttentionNeeds) -> str:
    """The backend for `needs`: the requested one, or with "auto" the first of BACKENDS that is installed and has all.

    Raises:
        ValueError: not a backend's name, or the requested one is not installed or lacks something.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(f"attention_backend={requested!r}; choose one of auto, {', '.join(BACKENDS)}")
        reason = _lacks(requested, needs) if _installed(requested) else "it is not installed"
        if reason:
            raise ValueError(f"attention_backend={requested!r} cannot be used: {reason}; 'auto' picks one that can")
        return requested
    for backend in BACKENDS:
        if _installed(backend) and _lacks(backend, needs) is None:
            logger.info("attention backend: %s (head dim %d, %s)", backend, needs.head_dim, needs.dtype)
            if backend == "sdpa" and needs.device == "cuda":
                reason = _lacks("varlen", needs)
                logger.warning("attention runs one SDPA call per segment, which is slow on a GPU: varlen: %s", reason)
            return backend
    raise AssertionError("sdpa takes everything")


def attend(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every segment.

    Args:
        backend: a name of BACKENDS. q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), one floating dtype.
        cu_q, cu_k: (B + 1,) int32 offsets. max_q, max_k: the longest segment.
        window: keys that a query sees, itself included. softcap: c of c * tanh(scores / c).
        sinks: (H,) a logit per head that takes probability and has no value.

    Returns:
        (T, H, Dv) of q's dtype.

    Raises:
        ValueError: the backend does not have an option that was given.
    """
    if backend != "sdpa":
        given = {"softcap": softcap is not None, "dropout": dropout > 0, "window": window is not None}
        needs = AttentionNeeds(
            "cuda", (9, 0), torch.bfloat16, max(q.shape[-1], v.shape[-1]), sinks=sinks is not None, **given
        )
        reason = _lacks(backend, needs)
        if reason:
            raise ValueError(f"attention backend {backend!r} cannot run this layer: {reason}")
    if window is not None and window >= max_k:
        window = None  # every key is within reach
    if backend == "sdpa":
        return _sdpa(q, k, v, cu_q, cu_k, scaling, dropout, window, softcap, sinks)
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:  # multi-head latent attention; these kernels take one head dim
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    if backend == "varlen":
        out = _varlen(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window)
    else:
        out = _flash(backend, q, k, v, cu_q, cu_k, max_q, max_k, scaling, dropout, window, softcap)
    return out[..., :value_dim]


def _flash(backend, q, k, v, cu_q, cu_k, max_q, max_k, scaling, dropout, window, softcap):
    """transformers loads the library of that name and maps these arguments to its version."""
    return _flash_attention_forward(
        q[None],
        k[None],
        v[None],
        None,
        query_length=q.shape[0],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=cu_q,
        cu_seq_lens_k=cu_k,
        max_length_q=max_q,
        max_length_k=max_k,
        attn_implementation=backend,
    )[0]


@functools.cache
def _varlen_function():
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window):
    varlen_attn, has_to_be_told = _varlen_function()
    # torch 2.11 has no keyword and no check, and its kernel takes grouped heads as they are. Repeated ones would be
    # kept for the backward by every layer.
    options = {"enable_gqa": True} if has_to_be_told and q.shape[1] != k.shape[1] else {}
    # (left, right) keys beside the query's own place, at the end of its segment: (-1, 0) is plain causal.
    sides = (-1 if window is None else window - 1, 0)
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=sides, **options)


def _segment_mask(q_len: int, k_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(q_len, k_len) bool: query i sits at position k_len - q_len + i of its path."""
    query = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _sdpa(q, k, v, cu_q, cu_k, scaling, dropout, window, softcap, sinks):
    out = []
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, rows, D)
    groups = q.shape[1] // k.shape[1]
    # split, not slices: the backward of each slice would fill a whole row's gradient with zeros
    for q_b, k_b, v_b in zip(q.split(lengths_q, 2), k.split(lengths_k, 2), v.split(lengths_k, 2), strict=True):
        q_len, k_len = q_b.shape[2], k_b.shape[2]
        seen = window if window is not None and k_len > window else None
        plain = q_len == k_len and seen is None
        if softcap is not None or sinks is not None:
            mask = _segment_mask(q_len, k_len, seen, q.device)
            out.append(_explicit(q_b, k_b, v_b, mask, groups, scaling, dropout, softcap, sinks))
            continue
        out.append(
            F.scaled_dot_product_attention(
                q_b,
                k_b,
                v_b,
                attn_mask=None if plain else _segment_mask(q_len, k_len, seen, q.device),
                is_causal=plain,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=groups > 1,
            )
        )
    return torch.cat(out, dim=2)[0].transpose(0, 1).contiguous()


def _explicit(q, k, v, mask, groups, scaling, dropout, softcap, sinks):
    """One segment with its scores in memory, for what SDPA does not have."""
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return F.dropout(weights, dropout) @ v

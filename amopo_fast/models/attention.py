"""Attention over a packed row, plugged into transformers through its public attention interface.

`switch_attention(model)` sets the model's implementation to "amopo_packed" (or "amopo_packed_eager", for a model that
ran "eager"). Until a row is active, that behaves as the implementation before. Under `packed_row(paths)` each trie
node's queries attend to the gathered keys and values of the path root..node, causal and aligned bottom-right. Nothing
of size T x T is made.

The row travels as one keyword argument of `model(...)`: gradient checkpointing, PEFT and FSDP2 hand it to the attention
function unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from amopo_fast.models.attention_backends import attend
from amopo_fast.packing.plan import Paths
from amopo_kernels import gather_rows

KEYWORD = "packed_row"
NAME = "amopo_packed"
_EAGER = f"{NAME}_eager"
# What models hand over that changes nothing in the attention of a row: positions are in the keys already.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
_NO_MASK = (1, 1, 1, 1)  # the shape of a mask that tells no two tokens apart
_row_active: ContextVar[bool] = ContextVar("amopo_packed_row_active", default=False)


class PackedRow:
    """A row on its way through a model. No dataclass: torch.compile would look into it and recompile for each row."""

    def __init__(self, paths: Paths, backend: str):
        self.paths, self.backend = paths, backend
        states = paths.states
        levels = () if states is None else states.levels
        sizes = [len(level.cu_seqlens) for level in levels]
        # Objects that are the same in every layer, on the device and here: fla keeps what it makes of them by identity.
        self.level_cu_seqlens = tuple(
            (there, torch.tensor(level.cu_seqlens))
            for there, level in zip(states.level_cu_seqlens.split(sizes) if states else (), levels, strict=True)
        )


@contextmanager
def packed_row(paths: Paths, backend: str) -> Iterator[dict[str, Any]]:
    """While open, no mask is made; yields the keyword arguments that `model(...)` must get."""
    token = _row_active.set(True)
    # transformers hands a mask of four dimensions on as it is. Without one it asks, waiting for the device, whether
    # the positions are those of one sequence.
    mask = torch.ones(_NO_MASK, dtype=torch.bool, device=paths.position_ids.device)
    try:
        yield {"position_ids": paths.position_ids, "attention_mask": mask, KEYWORD: PackedRow(paths, backend)}
    finally:
        _row_active.reset(token)


def row_is_active() -> bool:
    """Whether a packed row is going through a model."""
    return _row_active.get()


def switch_attention(model: nn.Module) -> None:
    """Give a transformers model the packed implementation, in place, and keep how it runs without a row.

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
    """Whether the model's attention takes packed rows."""
    return model.config.get_text_config()._attn_implementation in (NAME, _EAGER)


# Runs outside compiled graphs: segment lengths are data, and a layer compiled around it is the same for every row.
@torch.compiler.disable
def _packed(query, key, value, row: PackedRow, scaling, dropout, window, softcap, sinks) -> torch.Tensor:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, Dv)."""
    if query.shape[0] != 1:
        raise ValueError(f"a packed row has batch size 1, got {query.shape[0]}")
    paths = row.paths
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast RoPE and norms may hand over float32; the projections that made value say the dtype.
    dtype = value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    if paths.kv_indices.shape[0] != q.shape[0]:  # otherwise nothing is shared: the row is its own keys
        k, v = (gather_rows(x, paths.kv_indices, paths.kv_order, paths.kv_offsets, validate=False) for x in (k, v))
    return attend(
        row.backend,
        q,
        k,
        v,
        paths.cu_seqlens_q,
        paths.cu_seqlens_k,
        paths.max_seqlen_q,
        paths.max_seqlen_k,
        scaling=scaling,
        dropout=dropout,
        window=window,
        softcap=softcap,
        sinks=sinks,
    ).unsqueeze(0)


def _tempered(module: nn.Module, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Llama 4 scales queries without RoPE by their place in the row: taken back, and done by positions (1, T)."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query

    def scale(places: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    places = torch.arange(positions.shape[1], device=positions.device)
    return query * (scale(positions[0]) / scale(places)).to(query.dtype)[:, None]


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
    row = kwargs.pop(KEYWORD, None)
    if row is not None:
        unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT)
        masked = attention_mask is not None and attention_mask.shape != _NO_MASK
        if masked or unknown:
            raise ValueError(
                f"{type(module).__name__} gives its attention {', '.join(unknown) or 'a mask'}, which packed attention "
                "does not apply; train with --layout separate"
            )
        query = _tempered(module, query, row.paths.position_ids)
        return _packed(query, key, value, row, scaling, dropout, sliding_window, softcap, s_aux), None
    if row_is_active():
        raise RuntimeError(
            f"{type(module).__name__} did not get the row: its model does not hand keyword arguments to the "
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
    """transformers' attention interface; without a row this is "sdpa"."""
    return _attention(module, query, key, value, attention_mask, sdpa_attention_forward, **kwargs)


def _packed_or_eager(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention interface; without a row this is the eager function of the model's own file."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return _attention(module, query, key, value, attention_mask, eager, **kwargs)


def _refuse_padding(attention_mask: torch.Tensor | None = None, **_) -> None:
    """A row takes no mask of two dimensions; one is read only where the model did not get the row's own."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "a packed row came with an attention mask that leaves tokens out, which packed attention does not apply; "
            "call the model without attention_mask, or train with --layout separate"
        )


def _mask(make: Callable[..., torch.Tensor | None], *args, **kwargs) -> torch.Tensor | None:
    if not _row_active.get():
        return make(*args, **kwargs)
    _refuse_padding(**kwargs)
    return None


def _mask_or_sdpa(*args, **kwargs) -> torch.Tensor | None:
    return _mask(sdpa_mask, *args, **kwargs)


def _mask_or_eager(*args, **kwargs) -> torch.Tensor | None:
    return _mask(eager_mask, *args, **kwargs)

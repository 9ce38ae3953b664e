"""What a call of the head computes and how: decided once, before anything runs, and handed down whole."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import dispatch


@dataclass(frozen=True)
class Options:
    """Everything of a call but its tensors."""

    softcap: float | None
    temperature: float
    ignore_index: int
    entropy: bool
    dtype: torch.dtype  # of the matmuls' inputs
    backend: str  # "torch", "chunked" or "fused"
    mode: str  # how the gradient is had, one of dispatch.MODES
    cache_bytes: int  # for the probabilities that mode "cached" keeps

    def flat(self) -> tuple:
        """The fields in order, as a torch operator takes them; Options(*flat) is the way back."""
        return tuple([getattr(self, name) for name in NAMES])


NAMES = tuple(field.name for field in fields(Options))
_SCHEMA_TYPES = {
    "float | None": "float?", "float": "float", "int": "int", "bool": "bool", "str": "str", "torch.dtype": "ScalarType",
}  # fmt: skip
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(Options))


def choose_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    backend: str,
    cache_bytes: int = 0,
) -> Options:
    """The options of a call with checked shapes: the matmuls' dtype by torch's rules, backend and mode by `dispatch`.

    Raises:
        ValueError: softcap, temperature, backend. BackendUnavailableError, UnsupportedError: as `dispatch`.
    """
    if softcap is not None and softcap <= 0 or temperature <= 0:
        raise ValueError(f"softcap and temperature must be positive, got {softcap} and {temperature}")
    device = hidden.device.type
    # torch 2.11 cannot trace the first question; what is compiled is on a device that has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    autocast = available and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    backend = dispatch.choose_backend(backend, hidden, dtype)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    mode = dispatch.choose_mode(
        backend, dtype, entropy=entropy, cache_bytes=cache_bytes, frozen=needed == [True, False, False]
    )
    if not any(needed):
        mode = "exact"  # which keeps nothing
    return Options(softcap, temperature, ignore_index, entropy, dtype, backend, mode, cache_bytes)

"""Which backend computes the head, what each one supports, and how often each path ran."""

from __future__ import annotations

import collections
import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BackendUnavailableError, UnsupportedError

log = logging.getLogger("amopo_kernels")

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# Above this width the vendor's matmuls win back the 16 bytes per logit that chunked writes and reads. By arithmetic
# (docs/kernels.md), not measured.
FUSED_UP_TO_FEATURES = 4096


@dataclass(frozen=True)
class Support:
    """What a backend computes in one mode. Every mode has a softcap, a temperature and a bias."""

    dtypes: tuple[torch.dtype, ...]
    entropy: bool
    bias_gradient: bool


_TORCH = Support((torch.float64, torch.float32, *SIXTEEN_BIT), entropy=True, bias_gradient=True)
_TRITON = Support((torch.float32, *SIXTEEN_BIT), entropy=True, bias_gradient=True)
_NO_ENTROPY = Support(_TRITON.dtypes, entropy=False, bias_gradient=True)
# Frozen: taken for exact gradients where only hidden needs one; with entropy or a bias's gradient exact runs instead.
_FROZEN = Support(_TRITON.dtypes, entropy=False, bias_gradient=False)
SUPPORT = {
    ("torch", "exact"): _TORCH,
    ("chunked", "exact"): _TRITON,
    ("chunked", "cached"): _NO_ENTROPY,
    ("chunked", "frozen"): _FROZEN,
    ("fused", "exact"): _TRITON,
    ("fused", "cached"): _NO_ENTROPY,
    ("fused", "frozen"): _FROZEN,
    ("fused", "filtered"): _NO_ENTROPY,
}
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "torch", "chunked", "fused")

_runs: collections.Counter[tuple[str, str]] = collections.Counter()


def count(backend: str, mode: str) -> None:
    if not torch.compiler.is_compiling():
        _runs[backend, mode] += 1


def runs() -> dict[tuple[str, str], int]:
    """How often the forward of each (backend, mode) ran in this process; without "torch" inside torch.compile."""
    return dict(_runs)


def choose_backend(backend: str, hidden: Tensor, dtype: torch.dtype, gradient: str) -> str:
    """The backend that runs; "auto" is the rule of `_automatic`.

    Raises:
        ValueError: unknown name. BackendUnavailableError: it cannot run on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        chosen, why = _automatic(hidden, dtype, gradient)
        if not torch.compiler.is_compiling():
            _log_once(chosen, why)
        return chosen
    missing = None if backend == "torch" else _missing_for_triton(hidden.device)
    if missing:
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: {missing}; use 'torch' or 'auto'")
    return backend


def _automatic(hidden: Tensor, dtype: torch.dtype, gradient: str) -> tuple[str, str]:
    if hidden.device.type != "cuda":
        return "torch", f"tensors on {hidden.device.type}"
    missing = _missing_for_triton(hidden.device)
    if missing:
        return "torch", missing
    if dtype == torch.float64:
        return "torch", "float64"
    if gradient == "filtered":
        return "fused", "gradient='filtered'"
    if dtype == torch.float32:
        return "chunked", "float32 matmuls are the vendor's"
    if hidden.shape[-1] <= FUSED_UP_TO_FEATURES:
        return "fused", f"{dtype}, H <= {FUSED_UP_TO_FEATURES}"
    return "chunked", f"{dtype}, H > {FUSED_UP_TO_FEATURES}"


def _missing_for_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"compute capability {capability}, Triton kernels need 8.0"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels need CUDA tensors, these are on {device.type}"


@functools.cache
def _log_once(chosen: str, why: str) -> None:
    log.info("backend auto: %s (%s)", chosen, why)


def choose_mode(
    backend: str, dtype: torch.dtype, *, gradient: str, entropy: bool, cache_bytes: int, only_hidden_needs_grad: bool
) -> str:
    """How the backend gets the gradient: "exact", "cached", "frozen" or "filtered".

    Raises:
        ValueError: unknown gradient. UnsupportedError: the backend does not do that.
    """
    if gradient not in ("exact", "filtered"):
        raise ValueError(f"gradient={gradient!r}; choose 'exact' or 'filtered'")
    if gradient == "filtered":
        mode = "filtered"
        if cache_bytes:
            raise UnsupportedError("gradient='filtered' keeps no logits; leave logits_cache_bytes at 0")
    elif backend != "torch" and only_hidden_needs_grad and not entropy:
        mode = "frozen"  # needs no cache: its backward does not touch the vocabulary
    else:
        mode = "cached" if cache_bytes else "exact"
    support = SUPPORT.get((backend, mode))
    if support is None:
        able = [name for name, other in SUPPORT if other == mode]
        option = {"cached": "logits_cache_bytes", "filtered": "gradient='filtered'"}[mode]
        raise UnsupportedError(f"backend {backend!r} does not have {option}; use {' or '.join(able)}, or leave it out")
    if dtype not in support.dtypes:
        raise UnsupportedError(f"backend {backend!r} does not compute in {dtype}; use 'torch' or another dtype")
    if entropy and not support.entropy:
        raise UnsupportedError(f"backend {backend!r} has no entropy in mode {mode!r}; use gradient='exact'")
    return mode

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

# Above this width the vendor's matmuls win back the 16 bytes per logit that chunked writes and reads. By arithmetic
# (docs/kernels.md), not measured; on Hopper fused was faster at every width measured.
FUSED_UP_TO_FEATURES = 4096


# What is asked for: nothing, logits_cache_bytes, a weight and bias without gradient.
MODES = ("exact", "cached", "frozen")


@dataclass(frozen=True)
class Support:
    """What a backend does when a mode is asked for. Every one takes a bias, a softcap, temperatures and all outputs."""

    mode: str  # what runs
    dtypes: tuple[torch.dtype, ...]  # of the matmuls


_ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUPPORT = {
    ("torch", "exact"): Support("exact", _ALL),
    ("torch", "frozen"): Support("frozen", _ALL),
    ("chunked", "exact"): Support("exact", _ALL[1:]),
    ("chunked", "cached"): Support("cached", _ALL[1:]),
    ("chunked", "frozen"): Support("frozen", _ALL[1:]),
    ("fused", "exact"): Support("exact", _ALL[1:]),
    ("fused", "cached"): Support("cached", _ALL[1:]),
    ("fused", "frozen"): Support("frozen", _ALL[1:]),
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


def choose_backend(backend: str, hidden: Tensor, dtype: torch.dtype) -> str:
    """The backend that runs; "auto" is the rule of `_automatic`.

    Raises:
        ValueError: unknown name. BackendUnavailableError: it cannot run on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        chosen, why = _automatic(hidden, dtype)
        if not torch.compiler.is_compiling():
            _log_once(chosen, why)
        return chosen
    missing = None if backend == "torch" else _missing_for_triton(hidden.device)
    if missing:
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: {missing}; use 'torch' or 'auto'")
    return backend


def _automatic(hidden: Tensor, dtype: torch.dtype) -> tuple[str, str]:
    if hidden.device.type != "cuda":
        return "torch", f"tensors on {hidden.device.type}"
    missing = _missing_for_triton(hidden.device)
    if missing:
        return "torch", missing
    if dtype == torch.float64:
        return "torch", "float64"
    if dtype == torch.float32:
        return "chunked", "float32 matmuls are the vendor's"
    if torch.cuda.get_device_capability(hidden.device)[0] == 9:
        return "fused", f"{dtype}, Hopper"
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


def choose_mode(backend: str, dtype: torch.dtype, *, cache_bytes: int, frozen: bool) -> str:
    """How the backend gets the gradient: one of MODES. A frozen head needs no cache.

    Raises:
        UnsupportedError: the backend does not do that.
    """
    asked = "frozen" if frozen else "cached" if cache_bytes else "exact"
    support = SUPPORT.get((backend, asked))
    if support is None:
        able = " or ".join(name for name, other in SUPPORT if other == asked)
        raise UnsupportedError(f"backend {backend!r} does not have logits_cache_bytes; use {able}, or leave it out")
    if dtype not in support.dtypes:
        raise UnsupportedError(f"backend {backend!r} does not compute in {dtype}; use 'torch' or another dtype")
    return support.mode


def support_matrix() -> str:
    """SUPPORT as the table of docs/kernels.md."""
    names = {"exact": "exact", "cached": "logits_cache_bytes", "frozen": "frozen weight"}
    lines = ["| backend | gradient | runs | bias, softcap, temperature, outputs | dtypes |", "|---" * 5 + "|"]
    for backend in ("torch", "chunked", "fused"):
        for mode in MODES:
            support = SUPPORT.get((backend, mode))
            if support is None:
                lines.append(f"| {backend} | {names[mode]} | refused | | |")
                continue
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in support.dtypes)
            lines.append(f"| {backend} | {names[mode]} | {support.mode} | yes | {dtypes} |")
    return "\n".join(lines)

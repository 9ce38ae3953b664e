"""In which dtype weights are kept and updated: the policy behind `--weight_precision`.

fp32             float32 master weights; matmuls in bfloat16 by autocast on GPUs
bf16_stochastic  bfloat16 weights, updates computed in float32 and rounded stochastically
bf16             bfloat16 weights, updates rounded to nearest: loses small updates, warned about
auto             fp32 on CPUs and where it fits into the GPU by the estimate, else bf16_stochastic; with an adapter
                 the frozen base model is bfloat16 on GPUs and the adapter, which alone is trained, float32
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WEIGHT_PRECISIONS = ("auto", "fp32", "bf16_stochastic", "bf16")


def autocasts_by_default() -> bool:
    """Whether this machine's GPU computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def weights_dtype(
    weight_precision: str, *, device: torch.device, adapter: bool, fp32_fits: Callable[[], bool]
) -> torch.dtype:
    """The dtype to load a model in.

    Args:
        weight_precision: one of WEIGHT_PRECISIONS.
        device: where it is trained.
        adapter: whether the model is frozen under an adapter.
        fp32_fits: asked for "auto" on a GPU: whether a run with float32 weights fits.
    """
    if weight_precision == "auto":
        if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float32
        if adapter or not fp32_fits():
            return torch.bfloat16
        return torch.float32
    return torch.float32 if weight_precision == "fp32" else torch.bfloat16

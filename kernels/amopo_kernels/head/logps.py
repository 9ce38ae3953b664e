"""linear_logps: log-probabilities of labels under a linear head, without materialising the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..validation import wants_values
from . import torch_slices
from .validation import check_labels, check_linear


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(cap(hidden @ weight.T + bias) / temperature)[labels].

    Args:
        hidden: (..., H) floating point. weight: (V, H). labels: (...) int64 or int32: the token that each row
            predicts; nothing is shifted. bias: (V,).
        softcap: cap(x) = softcap * tanh(x / softcap), applied after the bias and before the temperature.
        ignore_index: rows with this label give 0.0 and no gradient.
        return_entropy: also return the entropy of each row's distribution, in nats.
        backend: "fused" (Triton matmuls), "chunked" (vendor matmuls over slices of the vocabulary, Triton epilogues),
            "torch" (slices in plain torch: any device and dtype) or "auto", the rule in `dispatch`.
        validate: check label values, which synchronises; default: on the CPU only. Unchecked bad labels give NaN.

    Returns:
        logps (...), or (logps, entropy): float32, float64 for float64 inputs. Differentiable once, for any gradient
        per token, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, labels. ShardedTensorError: a DTensor.
        BackendUnavailableError: the backend cannot run here. UnsupportedError: it cannot do this.
        DoubleBackwardError: a gradient of a gradient.
    """
    check_linear(hidden, weight, labels, bias)
    if wants_values(validate, labels):
        check_labels(labels, weight.shape[0], ignore_index)
    logps, entropy = label_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias,
        softcap=softcap, temperature=temperature, ignore_index=ignore_index, entropy=return_entropy, backend=backend,
    )[:2]  # fmt: skip
    logps = logps.reshape(labels.shape)
    return (logps, entropy.reshape(labels.shape)) if return_entropy else logps


def label_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    bias: Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    backend: str,
    cache_bytes: int = 0,
) -> tuple[Tensor, Tensor | None, str]:
    """(logps (N,), entropy (N,) or None, the backend that ran) of checked shapes and labels: dispatch and compute."""
    if softcap is not None and softcap <= 0 or temperature <= 0:
        raise ValueError(f"softcap and temperature must be positive, got {softcap} and {temperature}")
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
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
    labels = labels.long()
    with torch.autocast(device, enabled=False):
        if backend == "torch":
            dispatch.count(backend, mode)
            ignored = labels == ignore_index
            options = torch_slices.Options(softcap, temperature, dtype, entropy)
            results = torch_slices.LinearLogps.apply(
                hidden, weight, bias, labels.masked_fill(ignored, -1), ignored, options
            )
            return *results, backend
        from . import operators

        results = operators.linear_logps(
            hidden, weight, bias, labels, ignore_index, softcap, temperature, dtype, backend, mode, entropy,
            cache_bytes,
        )  # fmt: skip
    return results[0], results[1] if entropy else None, backend

"""linear_logps: log-probabilities of labels under a linear head, without materialising the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation
from .backends import torch_slices


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
        backend: "torch" or "auto"; "chunked" and "fused" are not built yet.
        validate: check label values, which synchronises; default: on the CPU only. Unchecked bad labels give NaN.

    Returns:
        logps (...), or (logps, entropy): float32, float64 for float64 inputs. Differentiable once, for any gradient
        per token, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, labels. ShardedTensorError: a DTensor.
        BackendUnavailableError: the backend. DoubleBackwardError: a gradient of a gradient.
    """
    validation.choose_backend(backend)
    validation.check_linear(hidden, weight, labels, bias)
    if softcap is not None and softcap <= 0 or temperature <= 0:
        raise ValueError(f"softcap and temperature must be positive, got {softcap} and {temperature}")
    if validation.wants_values(validate, labels):
        validation.check_labels(labels, weight.shape[0], ignore_index)
    shape = labels.shape
    labels = labels.reshape(-1).long()
    ignored = labels == ignore_index
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    else:
        compute_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    options = torch_slices.Options(softcap, temperature, compute_dtype, return_entropy)
    with torch.autocast(device, enabled=False):
        logps, entropy = torch_slices.LinearLogps.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.masked_fill(ignored, -1), ignored, options
        )
    logps = logps.reshape(shape)
    return (logps, entropy.reshape(shape)) if return_entropy else logps

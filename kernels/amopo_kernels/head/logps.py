"""linear_logps: log-probabilities of labels under a linear head, without materialising the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..validation import wants_values
from . import torch_slices
from .options import Options, choose_options
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
    options = choose_options(
        hidden, weight, bias, softcap=softcap, temperature=temperature, ignore_index=ignore_index,
        entropy=return_entropy, backend=backend,
    )  # fmt: skip
    logps, entropy = label_logps(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias, options)
    logps = logps.reshape(labels.shape)
    return (logps, entropy.reshape(labels.shape)) if return_entropy else logps


def label_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """(logps (N,), entropy (N,) or None) of checked shapes and labels."""
    labels = labels.long()
    with torch.autocast(hidden.device.type, enabled=False):
        if options.backend == "torch":
            dispatch.count("torch", options.mode)
            ignored = labels == options.ignore_index
            labels = labels.masked_fill(ignored, -1)
            return torch_slices.LinearLogps.apply(hidden, weight, bias, labels, ignored, options)
        from . import operators

        logps, entropy = operators.linear_logps(hidden, weight, bias, labels, *options.flat())[:2]
    return logps, entropy if options.entropy else None

"""What the head refuses. `check_linear` reads no values; `check_labels` does, which synchronises."""

from __future__ import annotations

from torch import Tensor

from ..errors import BackendUnavailableError
from ..validation import INTEGERS, check_tensor


def check_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, temperature: float | Tensor,
    sharded: bool = False,
) -> None:
    """hidden (..., H), weight (V, H), labels (...), bias (V,), temperature a number or (...); on one device.

    A rank of a sharded vocabulary may have no token.

    Raises:
        TypeError, ValueError, ShardedTensorError: `check_tensor`. BackendUnavailableError: tensors without values.
    """
    check_tensor("hidden", hidden, ("...", "H"))
    device = hidden.device
    check_tensor("weight", weight, ("V", "H"), device=device)
    if not weight.shape[1] or not weight.shape[0] and not sharded:
        raise ValueError(f"weight must be (V, H) without a size of 0, got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}: the last sizes must agree")
    check_tensor("labels", labels, hidden.shape[:-1], device=device, dtypes=INTEGERS)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], device=device)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, hidden.shape[:-1], device=device)
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, which is not computed; pass temperature.detach()")
    elif not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor like labels, got {type(temperature).__name__}")
    if device.type == "meta":
        raise BackendUnavailableError(
            "the tensors are on meta and hold no values; for shapes alone, run under torch's FakeTensorMode"
        )


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    bad = (labels < 0) | (labels >= vocabulary)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        label = int(labels.flatten()[row])
        raise ValueError(f"labels[{row}] = {label} is outside the vocabulary of {vocabulary} tokens")

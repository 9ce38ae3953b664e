"""What the head refuses. `check_linear` reads no values; `check_labels` does, which synchronises."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShardedTensorError


def check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if type(tensor).__name__ == "DTensor":
            raise ShardedTensorError(
                f"{name} is a DTensor; call this inside the wrapped forward, where FSDP has gathered it, "
                "or pass tensor.full_tensor()"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move them to one device")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be (V, H) with V > 0, got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}: the last sizes must agree")
    if labels.shape != hidden.shape[:-1]:
        expected, found = tuple(hidden.shape[:-1]), tuple(labels.shape)
        raise ValueError(f"labels must be {expected}, as hidden without its last size, got {found}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    bad = (labels < 0) | (labels >= vocabulary)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        label = int(labels.flatten()[row])
        raise ValueError(f"labels[{row}] = {label} is outside the vocabulary of {vocabulary} tokens")

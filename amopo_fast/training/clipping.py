"""Gradient clipping that leaves the gradients as they are where their norm is not finite.

torch's clip_grad_norm_ multiplies by max_norm / norm: one NaN reaches every gradient, and which ones were bad cannot be
told any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from amopo_fast.optim import backward_grad_norm


def clip_step(trainer: Any, model: nn.Module, max_norm: float) -> torch.Tensor | float:
    """The global 2-norm of a step's gradients, which are scaled in place to `max_norm`; 0: not at all. Where the
    optimizer stepped in the backward pass it has clipped; DeepSpeed and FSDP 1 clip by themselves."""
    norm = backward_grad_norm(trainer.optimizer)
    if norm is not None:
        return norm
    accelerator, parameters = trainer.accelerator, model.parameters()
    sharded = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if sharded or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    accelerator.unscale_gradients()
    return clip_gradients(parameters, max_norm)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients in place to a global 2-norm of `max_norm` at most, if it is finite and `max_norm` not 0. Decided
    on the device; sharded gradients may lie on several meshes.

    Returns:
        (), the norm before, over all shards.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    norms = [_whole(nn.utils.get_total_norm([parameter.grad for parameter in group])) for group in groups.values()]
    if not norms:
        return torch.zeros(())
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm:
        divisor = torch.where(norm.isfinite(), norm, 0.0)  # by which nothing is scaled
        for mesh, group in groups.items():
            on_mesh = divisor if mesh is None else DTensor.from_local(divisor, mesh)
            nn.utils.clip_grads_with_norm_(group, max_norm, on_mesh)
    return norm


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""The operands of a head: of nn.Linear, and of what PEFT puts around one. By the names of attributes, without PEFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


def operands(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) such that hidden weight^T + bias is what the head gives for `hidden` now.

    LoRA of rank r, h W^T + s (h A^T) B^T, is one product of (..., H + r) and (V, H + r).

    Raises:
        UnsupportedError: another kind of head.
    """
    if hasattr(head, "modules_to_save"):
        return operands(_chosen_copy(head), hidden)
    linear = linear_of(head)
    weight, bias = linear.weight, linear.bias
    adapters = _active_adapters(head)
    if not adapters:
        return hidden, weight, bias
    features, columns = [hidden], [weight]
    for name in adapters:
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        x = head.lora_dropout[name](hidden).to(a.weight.dtype)
        features.append((a(x) * scaling).to(hidden.dtype))
        columns.append(b.weight.to(weight.dtype))
        if b.bias is not None:
            shift = b.bias.to(weight.dtype) * scaling
            bias = shift if bias is None else bias + shift
    return torch.cat(features, -1), torch.cat(columns, 1), bias


def linear_of(head: nn.Module) -> nn.Module:
    """The nn.Linear that a head is or adapts.

    Raises:
        UnsupportedError: it is quantised, or something else.
    """
    linear = head
    while hasattr(linear, "modules_to_save") or hasattr(linear, "base_layer"):
        linear = _chosen_copy(linear) if hasattr(linear, "modules_to_save") else linear.base_layer
    # FSDP2 replaces a module's class by a subclass of its own and the module's.
    own_class = next(kind for kind in type(linear).__mro__ if not kind.__name__.startswith("FSDP"))
    if own_class is not nn.Linear:
        raise UnsupportedError(
            f"the head is a {type(linear).__name__}, not nn.Linear: leave it out of quantisation "
            "(llm_int8_skip_modules) or replace it by the layer that it computes"
        )
    return linear


def _chosen_copy(wrapper: nn.Module) -> nn.Module:
    """Of PEFT's modules_to_save, what its forward would use."""
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.original_module if wrapper.disable_adapters or not names else wrapper.modules_to_save[names[0]]


def _active_adapters(head: nn.Module) -> list[str]:
    """Names of the LoRA that is added to the head's base."""
    if not hasattr(head, "base_layer"):
        return []
    if head.disable_adapters and head.merged:
        head.unmerge()
    if head.disable_adapters or head.merged:
        return []
    if not hasattr(head, "lora_A"):
        raise UnsupportedError(
            f"the head is a {type(head).__name__}; of adapters on a head LoRA is known. Leave lm_head out of "
            "target_modules, or merge it first"
        )
    names = [name for name in head.active_adapters if name in head.lora_A]
    variants = [name for name in names if name in getattr(head, "lora_variant", {})]
    if variants:
        raise UnsupportedError(
            f"adapter {variants[0]!r} on the head is a {type(head.lora_variant[variants[0]]).__name__}, no plain LoRA; "
            "leave lm_head out of target_modules, or merge it first"
        )
    return names

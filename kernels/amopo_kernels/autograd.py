"""What the differentiable functions of this package have in common: once, in reverse mode, also under torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .errors import DoubleBackwardError, UnsupportedError


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise UnsupportedError where an argument has a tangent, which would be lost in silence."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError(
            f"{function} has no forward-mode derivative (torch.func.jvp, dual tensors); use torch.func.grad or vjp, or "
            "differentiate a plain formula, such as amopo_kernels.reference has"
        )


class Gradient(torch.autograd.Function):
    """The gradient of a public function, as a function that has none. Subclasses define `forward` and `of`.

    torch.func.grad records how every gradient was made (create_graph), so not that is refused, but to differentiate it.
    """

    of: ClassVar[str]  # the public function
    instead: ClassVar[str] = ""  # what to use for a second derivative; default: its reference
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @classmethod
    def once(cls) -> Callable:
        """What a backward calls. Compiled code refuses second derivatives itself; dynamo takes no Function in there."""
        return cls.forward if torch.compiler.is_compiling() else cls.apply

    @classmethod
    def backward(cls, ctx, *grads):
        instead = cls.instead or f"amopo_kernels.reference.{cls.of}"
        raise DoubleBackwardError(f"{cls.of} has no second derivative; use {instead} for gradients of gradients")

"""The errors of this package, apart from ValueError (a bad value or shape) and TypeError (a bad type)."""

import torch


class UnsupportedError(NotImplementedError):
    """The chosen backend cannot do what was asked for. The message names the backend, the request and the remedy."""


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run here: no Triton, or tensors on a device that it does not know."""


class ShardedTensorError(TypeError):
    """A DTensor was given. These functions need the whole local tensor."""


class DoubleBackwardError(RuntimeError):
    """A gradient of a gradient was asked for."""


class ReleasedTensorError(RuntimeError):
    """The backward pass needs an input whose memory was released after the forward pass."""


def refuse_double_backward(function: str, twice_differentiable: str) -> None:
    """In a backward pass: raise where that pass itself is to be differentiated (create_graph=True)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise DoubleBackwardError(
            f"{function} has no second derivative; call backward without create_graph, "
            f"or use {twice_differentiable} for gradients of gradients"
        )

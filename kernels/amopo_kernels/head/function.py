"""The head's two operators as one differentiable function, once, in reverse mode."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..autograd import Gradient, refuse_forward_mode
from ..errors import ReleasedTensorError
from . import operators
from .operators import Inputs, Kept, Outputs
from .options import Options
from .problem import Gradients


def head(inputs: Inputs, options: Options) -> Outputs:
    """Outputs of a call, differentiable in hidden, weight and bias.

    Raises:
        UnsupportedError: forward-mode differentiation.
    """
    refuse_forward_mode("linear_logps", *inputs[:3])
    return Outputs(*_Head.apply(*inputs, options))


class _Head(torch.autograd.Function):
    """Inputs and Options -> Outputs."""

    generate_vmap_rule = True  # torch.func.vmap runs the operators in a loop

    @staticmethod
    def forward(hidden, weight, bias, labels, row_temperature, mean_shares, options):
        return operators.linear_logps(hidden, weight, bias, labels, row_temperature, mean_shares, *options.flat())

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        inputs, outputs = Inputs(*tensors), Outputs(*output)
        wanted = _differentiable(ctx.options)
        ctx.mark_non_differentiable(*(x for name, x in outputs._asdict().items() if name not in wanted))
        ctx.set_materialize_grads(False)
        ctx.shapes = [None if x is None else x.shape for x in inputs[:3]]
        if ctx.options.mode == "frozen" and wanted == ["logps"]:
            inputs = inputs._replace(weight=None, bias=None)  # the gradient needs nothing of them
        ctx.save_for_backward(*inputs, outputs.unit_d_hidden, *(getattr(outputs, name) for name in Kept._fields))

    @staticmethod
    def backward(ctx, *grads):
        outputs, options = Outputs(*grads), ctx.options
        gradients = Gradients(**{name: getattr(outputs, name) for name in _differentiable(options)})
        saved = ctx.saved_tensors  # once: checkpointing hands every tensor out one time
        inputs, unit, kept = Inputs(*saved[:6]), saved[6], Kept(*saved[7:])
        if all(x is None for x in gradients):
            found = (None, None, None)
        elif options.mode == "frozen" and all(x is None for x in gradients[1:]):
            _, _, _, labels, row_temperature, _ = inputs
            d_hidden = _FrozenGradient.once()(gradients.logps, unit, inputs.hidden, labels, row_temperature, options)
            found = (d_hidden, None, None)
        else:
            _refuse_changed_shapes(inputs, ctx.shapes)
            options = replace(options, mode="exact") if options.mode == "frozen" else options
            needed = ctx.needs_input_grad[:3]
            found = _AnyGradient.once()(*gradients, *inputs, *kept, needed, options)
            found = [x if need else None for x, need in zip(found, needed, strict=True)]
        return *found, *(None,) * (len(Inputs._fields) - 2)


def _differentiable(options: Options) -> list[str]:
    return [name for name in Gradients._fields if name == "logps" or options.wants(name)]


class _AnyGradient(Gradient):
    """Gradients, Inputs, Kept, what is needed, Options -> gradients of hidden, weight and bias."""

    of = "linear_logps"

    @staticmethod
    def forward(*arguments):
        *tensors, needed, options = arguments
        return operators.linear_logps_backward(*tensors, *needed, *options.flat())


class _FrozenGradient(Gradient):
    """The gradient of hidden from the log-probabilities' and its part per unit of it. hidden itself is taken so that a
    derivative with respect to it is refused, and not missed."""

    of = "linear_logps"

    @staticmethod
    def forward(
        grad: Tensor, unit: Tensor, hidden: Tensor, labels: Tensor, row_temperature: Tensor | None, options: Options
    ):
        grad = grad / (options.temperature if row_temperature is None else row_temperature)
        if options.ignore_index is not None:
            grad = grad.masked_fill(labels == options.ignore_index, 0)
        return (unit * grad[:, None]).to(hidden.dtype)


def _refuse_changed_shapes(inputs: Inputs, shapes: list) -> None:
    for name, x, shape in zip(Inputs._fields, inputs, shapes, strict=False):
        if x is not None and x.shape != shape:
            raise ReleasedTensorError(
                f"{name} was {tuple(shape)} in the forward pass and is {tuple(x.shape)} in the backward pass, which "
                "computes with it; keep it, or call linear_logps inside the forward of the module that FSDP or ZeRO-3 "
                "wraps, so that it is gathered for both passes"
            )

"""The head of `fused` and `chunked` as torch operators: fake, autograd, compile.

An operator takes and returns tensors; what is not wanted is returned empty. The forward returns everything that its
backward needs, so that autograd keeps it when it differentiates and drops it when it does not. The numbers and strings
of a call are the fields of Options, in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..errors import refuse_double_backward
from . import passes
from .layout import Layout
from .options import SCHEMA, Options
from .problem import Problem, RowStatistics


def _problem(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Options) -> Problem:
    def operand(x: Tensor) -> Tensor:
        x = x.to(options.dtype)
        return x if x.stride(1) == 1 else x.contiguous()

    bias = bias if bias is None else bias.contiguous()
    return Problem(operand(hidden), operand(weight), bias, labels.contiguous(), options)


def _float32(hidden: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


@torch.library.custom_op(
    "amopo_kernels::linear_logps",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {SCHEMA}) -> ({', '.join(['Tensor'] * 7)})",
)
def linear_logps(hidden, weight, bias, labels, *options):
    """hidden (N, H), weight (V, H), bias (V,), labels (N,) -> logps, entropy, lse in bits, 1 - p_y, each (N,) float32;
    mode "frozen": dX per unit of gradient (N, H) float32; mode "cached": probabilities (N, C) in the matmuls' dtype and
    the log-sum-exp of their strips of columns, (strips, N) float32.
    """
    problem = _problem(hidden, weight, bias, labels, Options(*options))
    dispatch.count(problem.options.backend, problem.options.mode)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device; so in every operator here
        forward = passes.forward(problem)
    rows = forward.rows
    wanted = (rows.logps, rows.entropy, rows.lse, rows.miss, forward.unit_d_hidden, forward.cache, forward.strip_lse)
    return tuple(_float32(hidden, 0) if x is None else x for x in wanted)


@linear_logps.register_fake
def _(hidden, weight, bias, labels, *flat):
    options, N = Options(*flat), hidden.shape[0]
    layout = Layout.of(hidden, weight.shape[0], options)
    unit, cache, strips = (_float32(hidden, 0) for _ in range(3))
    if options.mode == "frozen":
        unit = _float32(hidden, *hidden.shape)
    if layout.cached:
        cache = torch.empty(N, layout.cache_width, dtype=options.dtype, device=hidden.device)
        strips = _float32(hidden, layout.cached_strips, N)
    entropy = _float32(hidden, N if options.entropy else 0)
    return _float32(hidden, N), entropy, _float32(hidden, N), _float32(hidden, N), unit, cache, strips


@torch.library.custom_op(
    "amopo_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"""(
        Tensor grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels,
        Tensor logps, Tensor entropy, Tensor lse, Tensor miss, Tensor cache, Tensor strip_lse,
        bool need_hidden, bool need_weight, bool need_bias, {SCHEMA}
    ) -> (Tensor, Tensor, Tensor)""",
)
def linear_logps_backward(
    grad, grad_entropy, hidden, weight, bias, labels, logps, entropy, lse, miss, cache, strip_lse,
    need_hidden, need_weight, need_bias, *options,
):  # fmt: skip
    """The gradients that are needed, in their tensors' dtypes, the others empty."""
    problem = _problem(hidden, weight, bias, labels, Options(*options))
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    d_bias = torch.empty_like(bias) if need_bias else None
    forward = passes.Forward(RowStatistics(logps, lse, miss, entropy), cache=cache, strip_lse=strip_lse)
    with torch.cuda.device_of(hidden):
        d_hidden = passes.backward(
            problem, forward, grad, grad_entropy, need_hidden=need_hidden, d_weight=d_weight, d_bias=d_bias
        )
    if need_hidden:
        d_hidden = d_hidden.to(hidden.dtype)
    return tuple(_float32(hidden, 0) if x is None else x for x in (d_hidden, d_weight, d_bias))


@linear_logps_backward.register_fake
def _(
    grad, grad_entropy, hidden, weight, bias, labels, logps, entropy, lse, miss, cache, strip_lse,
    need_hidden, need_weight, need_bias, *options,
):  # fmt: skip
    def like(x, needed):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else _float32(hidden, 0)

    return like(hidden, need_hidden), like(weight, need_weight), like(bias, need_bias)


def _save_for_backward(ctx, inputs, output):
    tensors, ctx.options = inputs[:4], inputs[4:]
    options = Options(*ctx.options)
    logps, entropy, lse, miss, unit, cache, strip_lse = output
    ctx.mark_non_differentiable(*(output[2:] if options.entropy else output[1:]))
    ctx.set_materialize_grads(False)
    ctx.hidden_dtype = tensors[0].dtype
    if options.mode == "frozen":
        ctx.save_for_backward(unit)
    else:
        ctx.save_for_backward(*tensors, logps, entropy, lse, miss, cache, strip_lse)


def _backward(ctx, grad, grad_entropy, *_):
    refuse_double_backward("linear_logps", "amopo_kernels.reference.linear_logps")
    options = Options(*ctx.options)
    nothing = (None,) * len(ctx.options)
    if grad is None and grad_entropy is None:
        return None, None, None, None, *nothing
    if options.mode == "frozen":
        (unit,) = ctx.saved_tensors
        d_hidden = (unit * (grad / options.temperature)[:, None]).to(ctx.hidden_dtype)
        return d_hidden, None, None, None, *nothing
    logps = ctx.saved_tensors[4]
    grad = torch.zeros_like(logps) if grad is None else grad
    needed = ctx.needs_input_grad[:3]
    gradients = torch.ops.amopo_kernels.linear_logps_backward(
        grad, grad_entropy, *ctx.saved_tensors, *needed, *ctx.options
    )
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, *nothing


linear_logps.register_autograd(_backward, setup_context=_save_for_backward)

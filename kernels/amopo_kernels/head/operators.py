"""The head of `fused` and `chunked` as torch operators: fake, autograd, compile.

An operator takes and returns tensors; what is not wanted is returned empty. The forward returns everything that its
backward needs, so that autograd keeps it when it differentiates and drops it when it does not.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import dispatch
from ..errors import refuse_double_backward
from . import passes
from .problem import Problem, RowStatistics


def _problem(hidden, weight, bias, labels, softcap, temperature, dtype) -> Problem:
    def operand(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x if x.stride(1) == 1 else x.contiguous()

    bias = bias if bias is None else bias.contiguous()
    return Problem(operand(hidden), operand(weight), bias, labels.contiguous(), softcap, temperature)


@torch.library.custom_op("amopo_kernels::linear_logps", mutates_args=())
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    gradient_mode: str,
    entropy: bool,
    cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), bias (V,), labels (N,) -> logps, entropy, lse in bits, 1 - p_y, each (N,) float32;
    mode "frozen": dX per unit of gradient (N, H) float32; mode "cached": probabilities (N, C) in dtype and the
    log-sum-exp of their strips of columns, (strips, N) float32.

    `dtype` is that of the matmuls.
    """
    dispatch.count(backend, gradient_mode)
    problem = _problem(hidden, weight, bias, labels, softcap, temperature, dtype)
    cached = passes.cached_columns(hidden, weight.shape[0], dtype, cache_bytes) if gradient_mode == "cached" else 0
    with torch.cuda.device_of(hidden):  # Triton launches on the current device; so in every operator here
        forward = passes.forward(
            problem, backend, ignore_index, entropy=entropy, unit_gradient=gradient_mode == "frozen", cached=cached
        )
    rows, empty = forward.rows, rows_like(hidden, 0)

    def present(x: Tensor | None) -> Tensor:
        return empty.clone() if x is None else x

    return (
        rows.logps, present(rows.entropy), rows.lse, rows.miss, present(forward.unit_d_hidden),
        present(forward.cache), present(forward.tile_lse),
    )  # fmt: skip


def rows_like(hidden: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


@linear_logps.register_fake
def _(hidden, weight, bias, labels, ignore_index, softcap, temperature, dtype, backend, gradient_mode, entropy,
      cache_bytes):  # fmt: skip
    N, vocabulary = hidden.shape[0], weight.shape[0]
    cached = passes.cached_columns(hidden, vocabulary, dtype, cache_bytes) if gradient_mode == "cached" else 0
    strip = passes.strip_columns(hidden, dtype, backend, entropy, gradient_mode in ("frozen", "cached"))
    cache, tiles = rows_like(hidden, 0), rows_like(hidden, 0)
    if cached:
        cache = torch.empty(N, passes.cache_width(cached, vocabulary), dtype=dtype, device=hidden.device)
        tiles = rows_like(hidden, triton.cdiv(cached, strip), N)
    unit = rows_like(hidden, *hidden.shape) if gradient_mode == "frozen" else rows_like(hidden, 0)
    return (
        rows_like(hidden, N), rows_like(hidden, N if entropy else 0), rows_like(hidden, N), rows_like(hidden, N),
        unit, cache, tiles,
    )  # fmt: skip


@torch.library.custom_op("amopo_kernels::linear_logps_backward", mutates_args=())
def linear_logps_backward(
    grad: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logps: Tensor,
    entropy: Tensor,
    lse: Tensor,
    miss: Tensor,
    cache: Tensor,
    tile_lse: Tensor,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    gradient_mode: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are needed, in their tensors' dtypes, the others empty."""
    problem = _problem(hidden, weight, bias, labels, softcap, temperature, dtype)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    d_bias = torch.empty_like(bias) if need_bias else None
    forward = passes.Forward(
        RowStatistics(logps, lse, miss, entropy), cache=cache if cache.numel() else None, tile_lse=tile_lse
    )
    with torch.cuda.device_of(hidden):
        d_hidden = passes.backward(
            problem, backend, forward, grad, grad_entropy, need_hidden=need_hidden, d_weight=d_weight, d_bias=d_bias
        )
    if need_hidden:
        d_hidden = d_hidden.to(hidden.dtype)
    return tuple(rows_like(hidden, 0) if x is None else x for x in (d_hidden, d_weight, d_bias))


@linear_logps_backward.register_fake
def _(grad, grad_entropy, hidden, weight, bias, labels, logps, entropy, lse, miss, cache, tile_lse,
      softcap, temperature, dtype, backend, gradient_mode, need_hidden, need_weight, need_bias):  # fmt: skip
    def like(x, needed):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else rows_like(hidden, 0)

    return like(hidden, need_hidden), like(weight, need_weight), like(bias, need_bias)


def _save_for_linear_logps(ctx, inputs, output):
    hidden, weight, bias, labels = inputs[:4]
    ctx.softcap, ctx.temperature, ctx.dtype, ctx.backend, ctx.mode = inputs[5:10]
    entropy = inputs[10]
    logps, row_entropy, lse, miss, unit, cache, tile_lse = output
    ctx.mark_non_differentiable(*(output[2:] if entropy else output[1:]))
    ctx.set_materialize_grads(False)
    ctx.hidden_dtype = hidden.dtype
    if ctx.mode == "frozen":
        ctx.save_for_backward(unit)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, logps, row_entropy, lse, miss, cache, tile_lse)


def _backward_of_linear_logps(ctx, grad, grad_entropy, *_):
    refuse_double_backward("linear_logps", "amopo_kernels.reference.linear_logps")
    nothing = (None,) * 8
    if grad is None and grad_entropy is None:
        return None, None, None, None, *nothing
    if ctx.mode == "frozen":
        (unit,) = ctx.saved_tensors
        return (unit * (grad / ctx.temperature)[:, None]).to(ctx.hidden_dtype), None, None, None, *nothing
    hidden, weight, bias, labels, logps, entropy, lse, miss, cache, tile_lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grad = torch.zeros_like(logps) if grad is None else grad
    gradients = torch.ops.amopo_kernels.linear_logps_backward(
        grad, grad_entropy, hidden, weight, bias, labels, logps, entropy, lse, miss, cache, tile_lse,
        ctx.softcap, ctx.temperature, ctx.dtype, ctx.backend, ctx.mode, *needed,
    )  # fmt: skip
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, *nothing


linear_logps.register_autograd(_backward_of_linear_logps, setup_context=_save_for_linear_logps)

"""`chunked`: vendor matmuls over slices of the vocabulary, and the epilogue of a slice of float32 products in Triton.

The device functions that finish a tile of products in `fused` finish a block that is loaded here. Reads 4 bytes per
logit, writes what the epilogue writes. One program per (ROWS, STRIP) block: bound by memory, no reuse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .log_sum_exp import LogSumExp
from .logit_gradient import LogitGradient
from .problem import Problem, Upstream
from .score_loop import finish_strip
from .tiles import load_tile


def _block() -> tuple[int, int]:
    """Rows and columns of a program."""
    return (32, 64) if launch.INTERPRETED else (16, 256)


@triton.jit
def _slice_kernel(
    products, scoring, epilogue, begin, end, stride,
    ROWS: tl.constexpr, STRIP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * STRIP
    block = load_tile(products, row, column, scoring.rows, end - begin, stride, ROWS, STRIP, False)
    finish_strip(block, row, begin + column, begin, scoring, epilogue, ROWS, STRIP, GRADIENT)


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b with float32 accumulation, in out's dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out=out)
    else:  # CPU matmuls have no float32 output for 16-bit inputs
        out.copy_(a.float() @ b.float())


def strip_columns(device: torch.device, dtype: torch.dtype, narrow: bool) -> int:
    """As score_loop.strip_columns; a block's columns, whatever the epilogue does."""
    return _block()[1]


def row_blocks(problem: Problem) -> int:
    """As score_loop.row_blocks."""
    return triton.cdiv(problem.rows, _block()[0])


def score_slice(problem: Problem, begin: int, end: int, strip: int, epilogue: LogSumExp | LogitGradient) -> None:
    """As score_loop.score_slice, for one slice whose products fit in memory."""
    products = torch.empty(problem.rows, end - begin, dtype=torch.float32, device=problem.hidden.device)
    matmul(problem.hidden, problem.weight[begin:end].T, products)
    height, _ = _block()
    _slice_kernel[(triton.cdiv(problem.rows, height), triton.cdiv(end - begin, strip))](
        products, problem.scoring, epilogue, begin, end, products.stride(0), ROWS=height, STRIP=strip,
        GRADIENT=isinstance(epilogue, LogitGradient), num_warps=4,
    )  # fmt: skip


def d_weight_slice(
    problem: Problem, begin: int, end: int, d_logits: Tensor, upstream: Upstream, out: Tensor
) -> None:
    """As slice_gradients.d_weight_slice."""
    d_logits = d_logits[:, : end - begin]
    if upstream.weight_scale is None:
        matmul(d_logits.T, upstream.hidden, out[begin:end])
        return
    unscaled = torch.empty(end - begin, problem.features, dtype=torch.float32, device=out.device)
    matmul(d_logits.T, upstream.hidden, unscaled)
    out[begin:end] = unscaled.mul_(upstream.weight_scale)


def new_d_hidden(problem: Problem) -> Tensor:
    """(1, N, H) float32 zeros for `add_d_hidden`."""
    return problem.hidden.new_zeros(1, problem.rows, problem.features, dtype=torch.float32)


def add_d_hidden(
    problem: Problem, begin: int, end: int, d_logits: Tensor, out: Tensor, rescale: Tensor | None = None
) -> None:
    """As slice_gradients.add_d_hidden."""
    d_logits, weight, out = d_logits[:, : end - begin], problem.weight[begin:end], out[0]
    if rescale is not None:
        out.mul_(rescale[:, None])
    if not out.is_cuda:
        out += d_logits.float() @ weight.float()
    elif d_logits.dtype == torch.float32:
        out.addmm_(d_logits, weight)
    else:
        torch.addmm(out, d_logits, weight, out_dtype=torch.float32, out=out)

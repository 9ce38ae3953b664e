"""`chunked`: vendor matmuls over slices of the vocabulary, and the epilogue of a slice of float32 products in Triton.

The device functions that finish a tile of products in `fused` finish a block that is loaded here. Reads 4 bytes per
logit, writes what the epilogue writes. One program per (ROWS, STRIP) block: bound by memory, no reuse.

Where rows are summed, eight threads have one, so that three shuffles finish its maximum and its sum. In the gradient,
which may sum columns and read a bias, a thread has the same columns of several rows.
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

LINE = tl.constexpr(32)  # float32 numbers that lie together, 128 bytes: what memory is read in


def _block() -> tuple[int, int]:
    """Rows and columns of a program."""
    return (32, 64) if launch.INTERPRETED else (16, 256)


@triton.jit
def _load_lines(products, row, column, rows, stride, ROWS: tl.constexpr, STRIP: tl.constexpr):
    """(ROWS, STRIP) of the products. A line has its eight threads and a row no more of them, which Triton gives where
    lines are a dimension of their own. What stands past a slice's end is anything: the epilogue leaves it out."""
    LINES: tl.constexpr = STRIP // LINE
    part = tl.arange(0, LINES * ROWS)  # a line of a row, rows innermost
    r = row + part % ROWS
    first = column + part // ROWS * LINE
    places = products + r.to(tl.int64)[:, None] * stride + (first[:, None] + tl.arange(0, LINE)[None, :])
    lines = tl.load(places, mask=(r < rows)[:, None], other=0.0)
    return tl.reshape(tl.permute(tl.reshape(lines, (LINES, ROWS, LINE)), (1, 0, 2)), (ROWS, STRIP))


@triton.jit
def _slice_kernel(
    begin, end, products, scoring, epilogue, stride,
    ROWS: tl.constexpr, STRIP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * STRIP
    if GRADIENT:
        block = load_tile(products, row, column, scoring.rows, end - begin, stride, ROWS, STRIP, False)
    else:
        block = _load_lines(products, row, column, scoring.rows, stride, ROWS, STRIP)
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
    return launch.blocks(problem.rows, _block()[0])


def scores(problem: Problem, strip: int, epilogue: LogSumExp | LogitGradient, width: int) -> launch.Slices:
    """As score_loop.scores, for slices of at most `width` columns, whole strips, whose products fit in memory."""
    products = torch.empty(problem.rows, width, dtype=torch.float32, device=problem.hidden.device)
    height, _ = _block()
    finish = launch.SliceLaunch(
        _slice_kernel,
        lambda columns: (launch.blocks(problem.rows, height), launch.blocks(columns, strip), 1),
        products, problem.scoring, epilogue, products.stride(0), ROWS=height, STRIP=strip,
        GRADIENT=isinstance(epilogue, LogitGradient), num_warps=4,
    )  # fmt: skip

    def slices(begin: int, end: int) -> None:
        matmul(problem.hidden, problem.weight[begin:end].T, products[:, : end - begin])
        finish(begin, end)

    return slices


def d_weight(problem: Problem, d_logits: Tensor, upstream: Upstream, out: Tensor) -> launch.Slices:
    """As slice_gradients.d_weight."""

    def slices(begin: int, end: int) -> None:
        of_slice = d_logits[:, : end - begin].T
        if upstream.weight_scale is None:
            matmul(of_slice, upstream.hidden, out[begin:end])
            return
        unscaled = torch.empty(end - begin, problem.features, dtype=torch.float32, device=out.device)
        matmul(of_slice, upstream.hidden, unscaled)
        out[begin:end] = unscaled.mul_(upstream.weight_scale)

    return slices


def new_d_hidden(problem: Problem) -> Tensor:
    """(1, N, H) float32 zeros for `d_hidden`."""
    return problem.hidden.new_zeros(1, problem.rows, problem.features, dtype=torch.float32)


def d_hidden(problem: Problem, d_logits: Tensor, out: Tensor) -> launch.Slices:
    """As slice_gradients.d_hidden."""
    out = out[0]

    def slices(begin: int, end: int) -> None:
        of_slice, weight = d_logits[:, : end - begin], problem.weight[begin:end]
        if not out.is_cuda:
            out.add_(of_slice.float() @ weight.float())
        elif of_slice.dtype == torch.float32:
            out.addmm_(of_slice, weight)
        else:
            torch.addmm(out, of_slice, weight, out_dtype=torch.float32, out=out)

    return slices

"""`chunked`: the epilogues of a slice of float32 logits that a vendor matmul has written.

The device functions that finish a tile of scores in `fused` finish a tile that is loaded here. Reads 4 bytes per logit;
writes 4 N / STRIP bytes per column (forward) or dS, 2 bytes per logit in bf16 (backward).
One program per (ROWS, STRIP) block: bound by memory, no reuse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .logit_gradient import finish_dlogits
from .problem import Probabilities, Problem, RowStatistics, TileStatistics, Upstream
from .score_loop import finish_scores
from .tiles import load_tile


def _block() -> tuple[int, int]:
    """Rows and columns of a program."""
    return (8, 64) if launch.INTERPRETED else (16, 256)


@triton.jit
def _slice_lse_kernel(
    logits, bias, labels, tile_lse, tile_entropy, label_score, probabilities, reference,
    rows, vocabulary, begin, end, logits_stride, probabilities_stride, softcap, scale, limit,
    ROWS: tl.constexpr, STRIP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    PROBABILITIES: tl.constexpr, RELATIVE_TO_ROW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * STRIP
    accumulator = load_tile(logits, row, column, rows, end - begin, logits_stride, ROWS, STRIP, False)
    finish_scores(
        accumulator, row, begin + column, bias, labels, tile_lse, tile_entropy, label_score, probabilities, reference,
        rows, vocabulary, begin, probabilities_stride, softcap, scale, limit,
        ROWS, STRIP, BIAS, SOFTCAP, ENTROPY, PROBABILITIES, RELATIVE_TO_ROW,
    )  # fmt: skip


@triton.jit
def _slice_dlogits_kernel(
    logits, bias, labels, lse, miss, logps, entropy, grad, grad_entropy, row_scale, dlogits, d_bias,
    rows, vocabulary, begin, end, logits_stride, width, softcap, scale,
    ROWS: tl.constexpr, STRIP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    D_BIAS: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * STRIP
    accumulator = load_tile(logits, row, column, rows, end - begin, logits_stride, ROWS, STRIP, False)
    finish_dlogits(
        accumulator, row, begin + column, bias, labels, lse, miss, logps, entropy, grad, grad_entropy, row_scale,
        dlogits, d_bias, rows, vocabulary, begin, width, softcap, scale,
        ROWS, STRIP, BIAS, SOFTCAP, ENTROPY, D_BIAS, ROW_SCALE,
    )  # fmt: skip


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b with float32 accumulation, in out's dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out=out)
    else:  # CPU matmuls have no float32 output for 16-bit inputs
        out.copy_(a.float() @ b.float())


def strip_columns(device: torch.device, dtype: torch.dtype, narrow: bool) -> int:
    return _block()[1]


def row_tiles(problem: Problem) -> int:
    """How many partial sums of the bias's gradient there are."""
    return triton.cdiv(problem.rows, _block()[0])


def _slice_logits(problem: Problem, begin: int, end: int) -> Tensor:
    logits = torch.empty(problem.rows, end - begin, dtype=torch.float32, device=problem.hidden.device)
    matmul(problem.hidden, problem.weight[begin:end].T, logits)
    return logits


def tile_lse(
    problem: Problem, begin: int, end: int, statistics: TileStatistics, probabilities: Probabilities | None = None
) -> None:
    """As score_loop.tile_lse, for one slice whose logits fit in memory."""
    logits = _slice_logits(problem, begin, end)
    out = probabilities.out if probabilities else None
    height, strip = _block()
    _slice_lse_kernel[(triton.cdiv(problem.rows, height), triton.cdiv(end - begin, strip))](
        logits, problem.bias, problem.labels, statistics.lse, statistics.entropy, statistics.label_score,
        out, probabilities.reference if probabilities else None,
        problem.rows, problem.vocabulary, begin, end, logits.stride(0), out.stride(0) if probabilities else 0,
        problem.softcap or 1.0, problem.scale, probabilities.limit if probabilities else 0.0,
        ROWS=height, STRIP=strip, BIAS=problem.bias is not None, SOFTCAP=problem.softcap is not None,
        ENTROPY=statistics.entropy is not None, PROBABILITIES=probabilities is not None,
        RELATIVE_TO_ROW=probabilities is not None and probabilities.reference is not None, num_warps=4,
    )  # fmt: skip


def dlogits(
    problem: Problem, begin: int, end: int, rows: RowStatistics, upstream: Upstream, out: Tensor, d_bias: Tensor | None
) -> None:
    """As logit_gradient.dlogits."""
    logits = _slice_logits(problem, begin, end)
    entropy = upstream.grad_entropy is not None
    height, strip = _block()
    _slice_dlogits_kernel[(triton.cdiv(problem.rows, height), triton.cdiv(end - begin, strip))](
        logits, problem.bias, problem.labels, rows.lse, rows.miss, rows.logps, rows.entropy,
        upstream.grad, upstream.grad_entropy, upstream.hidden_scale, out, d_bias,
        problem.rows, problem.vocabulary, begin, end, logits.stride(0), out.stride(0),
        problem.softcap or 1.0, problem.scale,
        ROWS=height, STRIP=strip, BIAS=problem.bias is not None, SOFTCAP=problem.softcap is not None, ENTROPY=entropy,
        D_BIAS=d_bias is not None, ROW_SCALE=upstream.hidden_scale is not None, num_warps=4,
    )  # fmt: skip


def d_weight_slice(
    problem: Problem, begin: int, end: int, dlogits: Tensor, upstream: Upstream, out: Tensor
) -> None:
    """As slice_gradients.d_weight_slice."""
    dlogits = dlogits[:, : end - begin]
    if upstream.weight_scale is None:
        matmul(dlogits.T, upstream.hidden, out[begin:end])
        return
    unscaled = torch.empty(end - begin, problem.features, dtype=torch.float32, device=out.device)
    matmul(dlogits.T, upstream.hidden, unscaled)
    out[begin:end] = unscaled.mul_(upstream.weight_scale)


def new_d_hidden(problem: Problem) -> Tensor:
    """(1, N, H) float32 zeros for `add_d_hidden`."""
    return problem.hidden.new_zeros(1, problem.rows, problem.features, dtype=torch.float32)


def add_d_hidden(
    problem: Problem, begin: int, end: int, dlogits: Tensor, out: Tensor, rescale: Tensor | None = None
) -> None:
    """As slice_gradients.add_d_hidden."""
    dlogits, weight, out = dlogits[:, : end - begin], problem.weight[begin:end], out[0]
    if rescale is not None:
        out.mul_(rescale[:, None])
    if not out.is_cuda:
        out += dlogits.float() @ weight.float()
    elif dlogits.dtype == torch.float32:
        out.addmm_(dlogits, weight)
    else:
        torch.addmm(out, dlogits, weight, out_dtype=torch.float32, out=out)

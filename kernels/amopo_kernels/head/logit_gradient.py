"""Backward of the head, step 1: the gradient of one slice of logits, from recomputed scores.

    dS[n, v] = g_n (1[v = y_n] - p_nv) cap'(z_nv)            p_nv = 2^(u_nv - lse_n);  1 - p at the label from `miss`

Work: 2 N H FLOP per column. Reads X and the slice of W, writes the slice of dS in the matmul dtype (2 N bytes per
column in bf16) and, for a bias, column sums of every row tile in float32. Order: as the forward, a persistent grid.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .problem import Problem, RowStatistics, Upstream
from .tiles import dot, grouped_tile, load_labels, load_tile, narrow, score_gradient, score_tile, strips_of


@triton.jit
def finish_dlogits(
    accumulator, row, column, bias, labels, lse, miss, logps, entropy, grad, grad_entropy, row_scale, dlogits, d_bias,
    rows, vocabulary, begin, width, softcap, scale,
    ROWS: tl.constexpr, STRIP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    D_BIAS: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """Write one strip of dS from its logits."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, STRIP)
    real = r < rows
    u, slope = score_tile(accumulator, c, vocabulary, bias, softcap, scale, BIAS, SOFTCAP)
    label = load_labels(labels, row, rows, vocabulary, ROWS)
    row_lse = tl.load(lse + r, mask=real, other=0.0)
    row_miss = tl.load(miss + r, mask=real, other=0.0)
    g = tl.load(grad + r, mask=real, other=0.0)
    row_logp = g
    row_entropy = g
    g_entropy = g
    if ENTROPY:
        row_logp = tl.load(logps + r, mask=real, other=0.0)
        row_entropy = tl.load(entropy + r, mask=real, other=0.0)
        g_entropy = tl.load(grad_entropy + r, mask=real, other=0.0)
    is_label = c[None, :] == label[:, None]
    gradient = score_gradient(
        u, slope, is_label, (c < vocabulary)[None, :], row_lse, row_miss, row_logp, row_entropy, g, g_entropy,
        SOFTCAP, ENTROPY,
    )  # fmt: skip
    places = dlogits + r.to(tl.int64)[:, None] * width + (c - begin)[None, :]
    tl.store(places, narrow(gradient, dlogits.dtype.element_ty), mask=real[:, None])
    if D_BIAS:
        if ROW_SCALE:
            gradient *= tl.load(row_scale + r, mask=real, other=0.0)[:, None]
        sums = tl.sum(tl.where(real[:, None], gradient, 0.0), 0)
        tl.store(d_bias + (row // ROWS).to(tl.int64) * width + (c - begin), sums)


@triton.jit
def _dlogits_kernel(
    hidden, weight, bias, labels, lse, miss, logps, entropy, grad, grad_entropy, row_scale, dlogits, d_bias,
    rows, vocabulary, features, begin, end, hidden_stride, weight_stride, width, softcap, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, D_BIAS: tl.constexpr, ROW_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(end - begin, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = begin + column_tile * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, features, DEPTH):
            x = load_tile(hidden, row, k, rows, features, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
            w = load_tile(weight, column, k, vocabulary, features, weight_stride, COLUMNS, DEPTH, DESCRIPTORS)
            accumulator = dot(x, w.T, accumulator, PRECISION)
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in tl.static_range(COLUMNS // STRIP):
            finish_dlogits(
                strips[i], row, column + i * STRIP, bias, labels, lse, miss, logps, entropy, grad, grad_entropy,
                row_scale, dlogits, d_bias, rows, vocabulary, begin, width, softcap, scale,
                ROWS, STRIP, BIAS, SOFTCAP, ENTROPY, D_BIAS, ROW_SCALE,
            )  # fmt: skip


def row_tiles(problem: Problem) -> int:
    """How many partial sums of the bias's gradient there are."""
    return triton.cdiv(problem.rows, launch.configuration(problem).scores.rows)


def dlogits(
    problem: Problem,
    begin: int,
    end: int,
    rows: RowStatistics,
    upstream: Upstream,
    out: Tensor,  # (N, width) matmul dtype, width a multiple of a tile's columns
    d_bias: Tensor | None,  # (row_tiles, width) float32
) -> None:
    """dS of the columns begin to end; columns past the vocabulary become 0."""
    configuration = launch.configuration(problem)
    tile, descriptors = configuration.scores, configuration.descriptors
    entropy = upstream.grad_entropy is not None
    _dlogits_kernel[launch.grid(problem, problem.rows, end - begin, tile)](
        launch.source(problem.hidden, (tile.rows, tile.depth), descriptors),
        launch.source(problem.weight, (tile.columns, tile.depth), descriptors),
        problem.bias, problem.labels, rows.lse, rows.miss, rows.logps, rows.entropy,
        upstream.grad, upstream.grad_entropy, upstream.hidden_scale, out, d_bias,
        problem.rows, problem.vocabulary, problem.features, begin, end,
        problem.hidden.stride(0), problem.weight.stride(0), out.stride(0), problem.softcap or 1.0, problem.scale,
        STRIP=min(tile.columns, 32 if entropy else 64), BIAS=problem.bias is not None,
        SOFTCAP=problem.softcap is not None, ENTROPY=entropy, D_BIAS=d_bias is not None,
        ROW_SCALE=upstream.hidden_scale is not None,
        **launch.matmul(configuration, tile, problem.hidden.dtype),
    )  # fmt: skip

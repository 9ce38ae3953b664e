"""Passes over label-excluded probabilities that the forward kept, for a backward that does not recompute scores.

Logit cache. The forward keeps Q = 2^(u - tile_lse) cap' of some columns, relative to their own strip, in the matmuls'
dtype, rounded as dS is, where a kept logit would be rounded at its own magnitude. dS is then elementwise:

    dS = g (1[y] (1 - p_y) cap'_y - Q 2^(tile_lse - lse))           reads 2 N, writes 2 N bytes per column in bf16

Frozen head. The forward accumulates dX32 += P W over the slices, P = 2^(u - reference) cap', and no backward pass over
the vocabulary is left. The reference of a row is raised when a strip exceeds it by more than the dtype can hold:

    raise:   reference' = max_j tile_lse[j],  P *= 2^(base - reference'),  dX32 *= 2^(reference - reference')
    finish:  dX[n] per unit of g = (1 - p_y) cap'_y W[y] - dX32 2^(reference - lse)

The label is outside P: inside it, rounding P to bf16 would leave no digit of 1 - p_y where p_y is near 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LOG2E
from . import launch
from .problem import Problem, RowStatistics, TileStatistics, Upstream
from .tiles import load_labels, narrow


@triton.jit
def _label_slope(logp, lse, softcap, scale, SOFTCAP: tl.constexpr):
    """cap' at the label, from its score."""
    slope = tl.full(lse.shape, 1.0, tl.float32)
    if SOFTCAP:
        t = (lse + logp * LOG2E) / (softcap * scale)
        slope = tl.maximum((1 - t) * (1 + t), 0.0)  # an ignored row's lse is huge; its slope must stay finite
    return slope


@triton.jit
def _cached_dlogits_kernel(
    cache, tile_lse, labels, lse, miss, logps, grad, row_scale, dlogits, d_bias,
    rows, vocabulary, begin, cache_stride, width, softcap, scale,
    ROWS: tl.constexpr, STRIP: tl.constexpr, SOFTCAP: tl.constexpr, D_BIAS: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    real = r < rows
    offset = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    c = begin + offset
    label = load_labels(labels, row, rows, vocabulary, ROWS)
    row_lse = tl.load(lse + r, mask=real, other=0.0)
    row_miss = tl.load(miss + r, mask=real, other=0.0)
    row_logp = tl.load(logps + r, mask=real, other=0.0)
    g = tl.load(grad + r, mask=real, other=0.0)
    strip = (begin // STRIP + tl.program_id(1)).to(tl.int64)
    share = tl.exp2(tl.load(tile_lse + strip * rows + r, mask=real, other=0.0) - row_lse)
    q = tl.load(cache + r.to(tl.int64)[:, None] * cache_stride + c[None, :], mask=real[:, None], other=0.0)
    at_label = row_miss * _label_slope(row_logp, row_lse, softcap, scale, SOFTCAP)
    gradient = tl.where(c[None, :] == label[:, None], at_label[:, None], -q.to(tl.float32) * share[:, None])
    gradient *= g[:, None]
    gradient = tl.where((c < vocabulary)[None, :], gradient, 0.0)
    places = dlogits + r.to(tl.int64)[:, None] * width + offset[None, :]
    tl.store(places, narrow(gradient, dlogits.dtype.element_ty), mask=real[:, None])
    if D_BIAS:
        if ROW_SCALE:
            gradient *= tl.load(row_scale + r, mask=real, other=0.0)[:, None]
        sums = tl.sum(tl.where(real[:, None], gradient, 0.0), 0)
        tl.store(d_bias + tl.program_id(0).to(tl.int64) * width + offset, sums)


@triton.jit
def _raise_kernel(
    probabilities, tile_lse, reference, rescale, rows, strips, stride, limit, headroom,
    ROWS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    before = tl.load(reference + r, mask=real, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, strips, STRIPS):
        t = first + tl.arange(0, STRIPS)
        place = tile_lse + t.to(tl.int64)[:, None] * rows + r[None, :]
        values = tl.load(place, mask=(t < strips)[:, None] & real[None, :], other=float("-inf"))
        largest = tl.maximum(largest, tl.max(values, 0))
    raised = largest - before > limit
    after = tl.where(raised, largest - headroom, before)
    tl.store(reference + r, after, mask=real)
    tl.store(rescale + r, tl.exp2(before - after), mask=real)
    if tl.max(raised.to(tl.int32), 0) > 0:  # rare after the first slice
        for strip in range(0, strips):
            lse = tl.load(tile_lse + tl.cast(strip, tl.int64) * rows + r, mask=real, other=0.0)
            base = tl.where(lse - before > limit, lse, before)
            factor = tl.exp2(base - after)
            c = strip * STRIP + tl.arange(0, STRIP)
            places = probabilities + r.to(tl.int64)[:, None] * stride + c[None, :]
            inside = (real & raised)[:, None]
            p = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            tl.store(places, narrow(p * factor[:, None], probabilities.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    d_hidden, weight, labels, lse, miss, logps, reference, rows, vocabulary, features, weight_stride, softcap, scale,
    FEATURES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    h = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    label = tl.load(labels + r)
    row_lse = tl.load(lse + r)
    at_label = tl.load(miss + r) * _label_slope(tl.load(logps + r), row_lse, softcap, scale, SOFTCAP)
    inside = h < features
    readable = h < tl.where((label >= 0) & (label < vocabulary), features, 0)
    w = tl.load(weight + label.to(tl.int64) * weight_stride + h, mask=readable, other=0.0).to(tl.float32)
    place = d_hidden + r.to(tl.int64) * features + h
    others = tl.load(place, mask=inside, other=0.0) * tl.exp2(tl.load(reference + r) - row_lse)
    tl.store(place, at_label * w - others, mask=inside)


def cached_dlogits(
    problem: Problem,
    begin: int,
    end: int,
    rows: RowStatistics,
    upstream: Upstream,
    cache: Tensor,  # (N, C) matmul dtype
    tile_lse: Tensor,  # (strips of C, N) float32
    strip: int,
    out: Tensor,  # (N, width) matmul dtype
    d_bias: Tensor | None,  # (row_blocks, width) float32
) -> None:
    """dS of the columns begin to end, which lie in the cache."""
    block = _block_rows(strip)
    _cached_dlogits_kernel[(triton.cdiv(problem.rows, block), triton.cdiv(end - begin, strip))](
        cache, tile_lse, problem.labels, rows.lse, rows.miss, rows.logps, upstream.grad, upstream.hidden_scale,
        out, d_bias, problem.rows, problem.vocabulary, begin, cache.stride(0), out.stride(0),
        problem.softcap or 1.0, problem.scale, ROWS=block, STRIP=strip, SOFTCAP=problem.softcap is not None,
        D_BIAS=d_bias is not None, ROW_SCALE=upstream.hidden_scale is not None, num_warps=4,
    )  # fmt: skip


def _block_rows(strip: int) -> int:
    """Rows of a block of cached_dlogits: 4096 values in all."""
    return 8 if launch.INTERPRETED else 4096 // strip


def row_blocks(problem: Problem, strip: int) -> int:
    """How many partial sums of the bias's gradient cached_dlogits writes."""
    return triton.cdiv(problem.rows, _block_rows(strip))


def raise_reference(
    probabilities: Tensor,  # (N, width) of one slice, changed in place
    begin: int,
    end: int,
    statistics: TileStatistics,
    reference: Tensor,  # (N,) float32, in bits, changed in place
    rescale: Tensor,  # (N,) float32, written: what the sum so far must be multiplied by
    limit: float,
    headroom: float,
) -> None:
    rows, strip, block = probabilities.shape[0], statistics.strip, 8 if launch.INTERPRETED else 16
    strips = triton.cdiv(end - begin, strip)
    _raise_kernel[(triton.cdiv(rows, block),)](
        probabilities, statistics.lse[begin // strip :], reference, rescale, rows, strips, probabilities.stride(0),
        limit, headroom, ROWS=block, STRIP=strip, STRIPS=64, num_warps=4,
    )  # fmt: skip


def finish_unit_gradient(
    problem: Problem,
    rows: RowStatistics,
    reference: Tensor,  # (N,) float32
    d_hidden: Tensor,  # (N, H) float32, changed in place
) -> None:
    block = 64 if launch.INTERPRETED else 1024
    _finish_kernel[(problem.rows, triton.cdiv(problem.features, block))](
        d_hidden, problem.weight, problem.labels, rows.lse, rows.miss, rows.logps, reference, problem.rows,
        problem.vocabulary, problem.features, problem.weight.stride(0), problem.softcap or 1.0, problem.scale,
        FEATURES=block, SOFTCAP=problem.softcap is not None, num_warps=4,
    )  # fmt: skip

"""Passes over label-excluded probabilities that the forward kept, for a backward that does not recompute scores.

Logit cache. The forward keeps Q = 2^(u - strip_lse) cap' of some columns, relative to their own strip, in the matmuls'
dtype, rounded as dS is, where a kept logit would be rounded at its own magnitude. dS is then elementwise:

    dS = g (1[y] (1 - p_y) cap'_y - Q 2^(strip_lse - lse))           reads 2 N, writes 2 N bytes per column in bf16

Frozen head. The forward accumulates dX32 += P W over the slices, P = 2^(u - reference) cap', and no backward pass over
the vocabulary is left. The reference of a row is raised when a strip exceeds it by more than the dtype can hold:

    raise:   reference' = max_j strip_lse[j],  P *= 2^(base - reference'),  dX32 *= 2^(reference - reference')
    finish:  dX[n] per unit of g = (1 - p_y) cap'_y W[y] - dX32 2^(reference - lse)

The label is outside P: inside it, rounding P to bf16 would leave no digit of 1 - p_y where p_y is near 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LOG2E
from . import launch
from .logit_gradient import LogitGradient, store_gradient
from .problem import Problem, RowStatistics, StripStatistics
from .tiles import load_labels, narrow


@triton.jit
def _label_slope(logp, lse, scoring):
    """cap' at the label, from its score."""
    slope = tl.full(lse.shape, 1.0, tl.float32)
    if scoring.softcap is not None:
        t = (lse + logp * LOG2E) / (scoring.softcap * scoring.scale)
        slope = tl.maximum((1 - t) * (1 + t), 0.0)  # an ignored row's lse is huge; its slope must stay finite
    return slope


@triton.jit
def _cached_gradient_kernel(
    cache, strip_lse, scoring, out, begin, cache_stride, ROWS: tl.constexpr, STRIP: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    real = r < scoring.rows
    place = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    c = begin + place
    label = load_labels(scoring, row, ROWS)
    lse = tl.load(out.lse + r, mask=real, other=0.0)
    miss = tl.load(out.miss + r, mask=real, other=0.0)
    logp = tl.load(out.logps + r, mask=real, other=0.0)
    g = tl.load(out.grad + r, mask=real, other=0.0)
    strip = (begin // STRIP + tl.program_id(1)).to(tl.int64)
    share = tl.exp2(tl.load(strip_lse + strip * scoring.rows + r, mask=real, other=0.0) - lse)
    q = tl.load(cache + r.to(tl.int64)[:, None] * cache_stride + c[None, :], mask=real[:, None], other=0.0)
    at_label = miss * _label_slope(logp, lse, scoring)
    gradient = tl.where(c[None, :] == label[:, None], at_label[:, None], -q.to(tl.float32) * share[:, None])
    gradient *= g[:, None]
    gradient = tl.where((c < scoring.vocabulary)[None, :], gradient, 0.0)
    store_gradient(gradient, r, place, tl.program_id(0), scoring, out)


@triton.jit
def _raise_kernel(
    probabilities, strip_lse, reference, rescale, rows, strips, stride, limit, headroom,
    ROWS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    before = tl.load(reference + r, mask=real, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, strips, STRIPS):
        t = first + tl.arange(0, STRIPS)
        place = strip_lse + t.to(tl.int64)[:, None] * rows + r[None, :]
        values = tl.load(place, mask=(t < strips)[:, None] & real[None, :], other=float("-inf"))
        largest = tl.maximum(largest, tl.max(values, 0))
    raised = largest - before > limit
    after = tl.where(raised, largest - headroom, before)
    tl.store(reference + r, after, mask=real)
    tl.store(rescale + r, tl.exp2(before - after), mask=real)
    if tl.max(raised.to(tl.int32), 0) > 0:  # rare after the first slice
        for strip in range(0, strips):
            lse = tl.load(strip_lse + tl.cast(strip, tl.int64) * rows + r, mask=real, other=0.0)
            base = tl.where(lse - before > limit, lse, before)
            factor = tl.exp2(base - after)
            c = strip * STRIP + tl.arange(0, STRIP)
            places = probabilities + r.to(tl.int64)[:, None] * stride + c[None, :]
            inside = (real & raised)[:, None]
            p = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            tl.store(places, narrow(p * factor[:, None], probabilities.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    d_hidden, weight, scoring, lse, miss, logps, reference, features, weight_stride, FEATURES: tl.constexpr
):
    r = tl.program_id(0)
    h = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    label = tl.load(scoring.labels + r)
    row_lse = tl.load(lse + r)
    at_label = tl.load(miss + r) * _label_slope(tl.load(logps + r), row_lse, scoring)
    inside = h < features
    readable = h < tl.where((label >= 0) & (label < scoring.vocabulary), features, 0)
    w = tl.load(weight + label.to(tl.int64) * weight_stride + h, mask=readable, other=0.0).to(tl.float32)
    place = d_hidden + r.to(tl.int64) * features + h
    others = tl.load(place, mask=inside, other=0.0) * tl.exp2(tl.load(reference + r) - row_lse)
    tl.store(place, at_label * w - others, mask=inside)


def cached_gradient(
    problem: Problem,
    begin: int,
    end: int,
    strip: int,
    cache: Tensor,  # (N, C) matmul dtype
    strip_lse: Tensor,  # (strips of C, N) float32
    out: LogitGradient,
) -> None:
    """dS of the columns begin to end, which lie in the cache; with no gradient of the entropy."""
    block = _block_rows(strip)
    _cached_gradient_kernel[(triton.cdiv(problem.rows, block), triton.cdiv(end - begin, strip))](
        cache, strip_lse, problem.scoring, out, begin, cache.stride(0), ROWS=block, STRIP=strip, num_warps=4
    )


def _block_rows(strip: int) -> int:
    """Rows of a block of cached_gradient: 4096 values in all."""
    return 8 if launch.INTERPRETED else 4096 // strip


def row_blocks(problem: Problem, strip: int) -> int:
    """How many partial sums of the bias's gradient cached_gradient writes."""
    return triton.cdiv(problem.rows, _block_rows(strip))


def raise_reference(
    probabilities: Tensor,  # (N, width) of one slice, changed in place
    begin: int,
    end: int,
    statistics: StripStatistics,
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
        d_hidden, problem.weight, problem.scoring, rows.lse, rows.miss, rows.logps, reference, problem.features,
        problem.weight.stride(0), FEATURES=block, num_warps=4,
    )  # fmt: skip

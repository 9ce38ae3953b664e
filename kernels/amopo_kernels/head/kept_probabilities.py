"""Passes over label-excluded exponentials that the forward kept, for a backward that does not recompute logits.

Logit cache. The forward keeps Q = 2^((z - strip's maximum) scale) cap' of some columns, in the matmuls' dtype, rounded
as dS is, where a kept logit would be rounded at its own magnitude. With share = 2^((strip's maximum - maximum) scale -
log_sum), dS is then elementwise:

    dS = g (1[y] (1 - p_y) cap'_y - Q share)           reads 2 N, writes 2 N bytes per column in bf16

The gradients of the other outputs are made of Q too, with log p = log(Q share): Q's rounding moves it by 2^-9 in bf16.
Where a softcap's slope is in Q, those of entropy and mean logit need the logit and are recomputed.

Frozen head. The forward accumulates dX32 += P W over the slices, P = 2^((z - reference) scale) cap', and no backward
pass over the vocabulary is left. The reference of a row, a logit, is raised when a strip exceeds it by more than the
dtype can hold:

    raise:   new = max_j maximum[j],  P *= 2^((base - new) scale),  dX32 *= 2^((reference - new) scale)
    finish:  dX[n] per unit of g = (1 - p_y) cap'_y W[y] - dX32 2^((reference - maximum) scale - log_sum)

The label is outside P: inside it, rounding P to bf16 would leave no digit of 1 - p_y where p_y is near 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LOG2E
from . import launch
from .logit_gradient import (
    LogitGradient,
    add_mean,
    gradient_at_label,
    gradient_of_others,
    store_gradient,
)
from .problem import Problem, RowStatistics, StripStatistics
from .tiles import load_labels, load_scale, narrow, rows_to_compute


@triton.jit
def _label_slope(rows, r, real, scale, softcap):
    """(ROWS,) cap' at the label, from its logit."""
    slope = tl.full(scale.shape, 1.0, tl.float32)
    if softcap is not None:
        log_sum = tl.load(rows.log_sum + r, mask=real, other=0.0)
        logp = tl.load(rows.logps + r, mask=real, other=0.0)
        t = (tl.load(rows.maximum + r, mask=real, other=0.0) + (log_sum + logp * LOG2E) / scale) / softcap
        slope = (1 - t) * (1 + t)
    return slope


@triton.jit
def _share_in_bits(rows, r, real, scale, reference):
    """(ROWS,) (reference - maximum) scale - log_sum; 2^ of it makes probabilities of exponentials."""
    distance = reference - tl.load(rows.maximum + r, mask=real, other=0.0)
    return distance * scale - tl.load(rows.log_sum + r, mask=real, other=0.0)


@triton.jit
def _cached_gradient_kernel(
    begin, end, cache, strip_maximum, scoring, out, cache_stride, ROWS: tl.constexpr, STRIP: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    real = r < rows_to_compute(scoring)
    place = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    c = begin + place
    scale = load_scale(scoring, r)
    strip = (begin // STRIP + tl.program_id(1)).to(tl.int64)
    reference = tl.load(strip_maximum + strip * scoring.rows + r, mask=real, other=0.0)
    share = _share_in_bits(out.rows, r, real, scale, reference)[:, None]
    q = tl.load(cache + r.to(tl.int64)[:, None] * cache_stride + c[None, :], mask=real[:, None], other=0.0)
    q = q.to(tl.float32)
    log_p = share
    if out.entropy is not None:  # then there is no softcap, and q has no slope in it
        log_p += tl.log2(q)
    gradient = gradient_of_others(q * tl.exp2(share), log_p, r, real, out)
    at_label = gradient_at_label(r, real, out) * _label_slope(out.rows, r, real, scale, scoring.softcap)
    is_label = c[None, :] == load_labels(scoring, r)[:, None]
    gradient = add_mean(tl.where(is_label, at_label[:, None], gradient), r, real, c, scoring, out)
    gradient = tl.where((c < scoring.vocabulary)[None, :], gradient, 0.0)
    store_gradient(gradient, r, place, tl.program_id(0), scoring, out)


@triton.jit
def _raise_kernel(
    begin, end, exponentials, strip_maximum, reference, d_hidden, scoring, stride, splits, features, limit, headroom,
    ROWS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(end - begin, STRIP)
    strip_maximum += (begin // STRIP).to(tl.int64) * scoring.rows
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    rows = scoring.rows
    real = r < rows_to_compute(scoring)
    scale = load_scale(scoring, r)
    before = tl.load(reference + r, mask=real, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, strips, STRIPS):
        t = first + tl.arange(0, STRIPS)
        place = strip_maximum + t.to(tl.int64)[:, None] * rows + r[None, :]
        values = tl.load(place, mask=(t < strips)[:, None] & real[None, :], other=float("-inf"))
        largest = tl.maximum(largest, tl.max(values, 0))
    raised = (largest - before) * scale > limit
    after = tl.where(raised, largest - headroom / scale, before)
    tl.store(reference + r, after, mask=real)
    if tl.max(raised.to(tl.int32), 0) > 0:  # rare after the first slice
        for strip in range(0, strips):
            maximum = tl.load(strip_maximum + tl.cast(strip, tl.int64) * rows + r, mask=real, other=0.0)
            base = tl.where((maximum - before) * scale > limit, maximum, before)
            factor = tl.exp2((base - after) * scale)
            c = strip * STRIP + tl.arange(0, STRIP)
            places = exponentials + r.to(tl.int64)[:, None] * stride + c[None, :]
            inside = (real & raised)[:, None]
            p = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            tl.store(places, narrow(p * factor[:, None], exponentials.dtype.element_ty), mask=inside)
        if begin > 0:  # before there is nothing in d_hidden
            factor = tl.exp2((before - after) * scale)
            blocks = tl.cdiv(features, FEATURES)
            for block in range(0, splits * blocks):
                h = block % blocks * FEATURES + tl.arange(0, FEATURES)
                places = d_hidden + (block // blocks * rows + r).to(tl.int64)[:, None] * features + h[None, :]
                inside = (real & raised)[:, None] & (h < features)[None, :]
                tl.store(places, tl.load(places, mask=inside, other=0.0) * factor[:, None], mask=inside)


@triton.jit
def _finish_kernel(d_hidden, weight, scoring, rows, reference, features, weight_stride, FEATURES: tl.constexpr):
    n = tl.program_id(0)
    r = n + tl.arange(0, 1)
    real = r < rows_to_compute(scoring)
    h = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    scale = load_scale(scoring, r)
    label = load_labels(scoring, r)
    at_label = tl.load(rows.miss + r, mask=real, other=0.0) * _label_slope(rows, r, real, scale, scoring.softcap)
    share = tl.exp2(_share_in_bits(rows, r, real, scale, tl.load(reference + r, mask=real, other=0.0)))
    inside = (h < features)[None, :] & real[:, None]
    readable = (h < features)[None, :] & (label >= 0)[:, None]
    places = weight + label.to(tl.int64)[:, None] * weight_stride + h[None, :]
    w = tl.load(places, mask=readable, other=0.0).to(tl.float32)
    place = d_hidden + r.to(tl.int64)[:, None] * features + h[None, :]
    others = tl.load(place, mask=inside, other=0.0) * share[:, None]
    tl.store(place, at_label[:, None] * w - others, mask=inside)


def cached_gradient(
    problem: Problem,
    strip: int,
    cache: Tensor,  # (N, C) matmul dtype
    strip_maximum: Tensor,  # (strips of C, N) float32
    out: LogitGradient,
) -> launch.SliceLaunch:
    """Makes dS of a slice that lies in the cache; with a softcap, without gradients of entropy and mean logit."""
    block = _block_rows(strip)
    return launch.SliceLaunch(
        _cached_gradient_kernel,
        lambda columns: (launch.blocks(problem.rows, block), launch.blocks(columns, strip), 1),
        cache, strip_maximum, problem.scoring, out, cache.stride(0), ROWS=block, STRIP=strip, num_warps=4,
    )  # fmt: skip


def _block_rows(strip: int) -> int:
    """Rows of a block of cached_gradient: 4096 values in all."""
    return 32 if launch.INTERPRETED else 4096 // strip


def row_blocks(problem: Problem, strip: int) -> int:
    """How many partial sums of the bias's gradient cached_gradient writes."""
    return launch.blocks(problem.rows, _block_rows(strip))


def raise_reference(
    problem: Problem,
    exponentials: Tensor,  # (N, width) of one slice, changed in place
    statistics: StripStatistics,
    reference: Tensor,  # (N,) float32, a logit, changed in place
    d_hidden: Tensor,  # (splits, N, H) float32, the sums so far, changed in place
    limit: float,
    headroom: float,
) -> launch.SliceLaunch:
    block = 32 if launch.INTERPRETED else 16
    return launch.SliceLaunch(
        _raise_kernel,
        lambda _: (launch.blocks(problem.rows, block), 1, 1),
        exponentials, statistics.tables.maximum, reference, d_hidden, problem.scoring, exponentials.stride(0),
        d_hidden.shape[0], problem.features, limit, headroom,
        ROWS=block, STRIP=statistics.strip, STRIPS=64, FEATURES=64, num_warps=4,
    )  # fmt: skip


def finish_unit_gradient(
    problem: Problem,
    rows: RowStatistics,
    reference: Tensor,  # (N,) float32
    d_hidden: Tensor,  # (N, H) float32, changed in place
) -> None:
    block = 64 if launch.INTERPRETED else 1024
    _finish_kernel[(problem.rows, triton.cdiv(problem.features, block))](
        d_hidden, problem.weight, problem.scoring, rows, reference, problem.features, problem.weight.stride(0),
        FEATURES=block, num_warps=4,
    )  # fmt: skip

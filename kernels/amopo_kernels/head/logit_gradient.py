"""Backward epilogue of the head: a strip of recomputed logits becomes the gradient of its products x . w.

    dS[n, v] = (mean_n share_v - probability_n p_nv - entropy_n p_nv (log p_nv + entropy of n)) cap'(z_nv)
    p_nv = 2^((z_nv - maximum_n) scale - log_sum_n);  at the label 1 - p from `miss`, as problem.Upstream has it

Writes dS in the matmul dtype (2 N bytes per column in bf16) and, for a bias, column sums of every block of rows in
float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LN2
from .problem import RowStatistics, Upstream
from .tiles import (
    load_labels,
    load_mean_shares,
    load_scale,
    logit_tile,
    may_hold_a_label,
    narrow,
    rows_to_compute,
)


class LogitGradient(NamedTuple):
    """What the epilogue reads of every row, (N,) float32, and where it writes."""

    rows: RowStatistics
    probability: Tensor  # the gradients of an Upstream
    label: Tensor | None
    mean: Tensor | None
    entropy: Tensor | None
    row_scale: Tensor | None  # what the row's dS was divided by
    d_logits: Tensor  # (N, width) matmul dtype, a layout.slice_buffer
    width: int  # a multiple of a tile's columns
    d_bias: Tensor | None  # (blocks of rows, width) float32

    @staticmethod
    def of(rows: RowStatistics, upstream: Upstream, out: Tensor, d_bias: Tensor | None) -> LogitGradient:
        return LogitGradient(
            rows, upstream.probability, upstream.label, upstream.mean, upstream.entropy, upstream.hidden_scale,
            out, out.stride(0), d_bias,
        )  # fmt: skip


@triton.jit
def gradient_of_others(p, log_p, r, real, out):
    """(ROWS, STRIP) of dS but the mean's part and cap', where no label is. log_p in bits; not read without entropy."""
    gradient = -p * tl.load(out.probability + r, mask=real, other=0.0)[:, None]
    if out.entropy is not None:
        entropy = tl.load(out.rows.entropy + r, mask=real, other=0.0)
        g_entropy = tl.load(out.entropy + r, mask=real, other=0.0)
        slope_of_entropy = p * (log_p * LN2 + entropy[:, None]) * g_entropy[:, None]
        gradient -= tl.where(p > 0, slope_of_entropy, 0.0)  # 0 log 0 = 0
    return gradient


@triton.jit
def gradient_at_label(r, real, out):
    """(ROWS,) the same at the label."""
    miss = tl.load(out.rows.miss + r, mask=real, other=0.0)
    gradient = miss * tl.load(out.probability + r, mask=real, other=0.0)
    if out.entropy is not None:
        entropy = tl.load(out.rows.entropy + r, mask=real, other=0.0)
        g_entropy = tl.load(out.entropy + r, mask=real, other=0.0)
        logp = tl.load(out.rows.logps + r, mask=real, other=0.0)
        gradient -= tl.where(miss < 1, (1 - miss) * (logp + entropy) * g_entropy, 0.0)
    if out.label is not None:
        gradient += tl.load(out.label + r, mask=real, other=0.0)
    return gradient


@triton.jit
def add_mean(gradient, r, real, c, scoring, out):
    if out.mean is not None:
        g_mean = tl.load(out.mean + r, mask=real, other=0.0)
        gradient += load_mean_shares(scoring, c)[None, :] * g_mean[:, None]
    return gradient


@triton.jit
def logit_gradient(products, r, c, column, scoring, out, STRIP: tl.constexpr):
    """(ROWS, STRIP) of dS of one strip's products x . w of rows r and columns c, from `column` on."""
    real = r < rows_to_compute(scoring)
    z, slope = logit_tile(products, c, scoring)
    maximum = tl.load(out.rows.maximum + r, mask=real, other=0.0)
    log_sum = tl.load(out.rows.log_sum + r, mask=real, other=0.0)
    log_p = (z - maximum[:, None]) * load_scale(scoring, r)[:, None] - log_sum[:, None]
    gradient = gradient_of_others(tl.exp2(log_p), log_p, r, real, out)
    label = load_labels(scoring, r)
    here = (label >= column) & (label < column + STRIP)
    if may_hold_a_label(here, scoring):
        gradient = tl.where(c[None, :] == label[:, None], gradient_at_label(r, real, out)[:, None], gradient)
    gradient = add_mean(gradient, r, real, c, scoring, out)
    if scoring.softcap is not None:
        gradient *= slope
    # Not a product with the mask: a row whose log_sum is NaN must not leak into the columns past the vocabulary.
    return tl.where((c < scoring.vocabulary)[None, :], gradient, 0.0)


@triton.jit
def store_gradient(gradient, r, place, block, scoring, out):
    """(ROWS, STRIP) of dS of rows r, at columns `place` of the slice, and its column sums for a block of rows.

    The buffer holds whole tiles of rows; a mask would cost registers that some epilogues do not have."""
    if scoring.count is not None:  # what stands behind is read with its tile
        gradient = tl.where((r < rows_to_compute(scoring))[:, None], gradient, 0.0)
    places = out.d_logits + r.to(tl.int64)[:, None] * out.width + place[None, :]
    tl.store(places, narrow(gradient, out.d_logits.dtype.element_ty))
    if out.d_bias is not None:
        real = r < scoring.rows
        if out.row_scale is not None:
            gradient *= tl.load(out.row_scale + r, mask=real, other=0.0)[:, None]
        sums = tl.sum(tl.where(real[:, None], gradient, 0.0), 0)
        tl.store(out.d_bias + block.to(tl.int64) * out.width + place, sums)

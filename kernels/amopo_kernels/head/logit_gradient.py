"""Backward epilogue of the head: a strip of recomputed scores becomes the gradient of its logits.

    dS[n, v] = g_n (1[v = y_n] - p_nv) cap'(z_nv)            p_nv = 2^(u_nv - lse_n);  1 - p at the label from `miss`
               - h_n p_nv (log p_nv + entropy_n) cap'(z_nv)  with a gradient h of the entropy

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
from .tiles import load_labels, narrow, score_tile


class LogitGradient(NamedTuple):
    """What the epilogue reads of every row, (N,) float32, and where it writes."""

    lse: Tensor  # in bits
    miss: Tensor  # 1 - p_y
    logps: Tensor  # in nats
    entropy: Tensor | None  # in nats
    grad: Tensor  # holds 1 / temperature, as grad_entropy
    grad_entropy: Tensor | None  # None: no gradient of the entropy
    row_scale: Tensor | None  # what the row's dS was divided by
    d_logits: Tensor  # (N, width) matmul dtype
    width: int  # a multiple of a tile's columns
    d_bias: Tensor | None  # (blocks of rows, width) float32

    @staticmethod
    def of(rows: RowStatistics, upstream: Upstream, out: Tensor, d_bias: Tensor | None) -> LogitGradient:
        return LogitGradient(
            rows.lse, rows.miss, rows.logps, rows.entropy, upstream.grad, upstream.grad_entropy, upstream.hidden_scale,
            out, out.stride(0), d_bias,
        )  # fmt: skip


@triton.jit
def finish_logit_gradient(logits, row, column, begin, scoring, out, ROWS: tl.constexpr, STRIP: tl.constexpr):
    """One strip, (ROWS, STRIP) logits without bias at (row, column); `begin` is the first column of the slice."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, STRIP)
    real = r < scoring.rows
    u, slope = score_tile(logits, c, scoring)
    label = load_labels(scoring, row, ROWS)
    lse = tl.load(out.lse + r, mask=real, other=0.0)
    miss = tl.load(out.miss + r, mask=real, other=0.0)
    g = tl.load(out.grad + r, mask=real, other=0.0)
    is_label = c[None, :] == label[:, None]
    shifted = u - lse[:, None]
    p = tl.exp2(shifted)
    gradient = tl.where(is_label, miss[:, None], -p) * g[:, None]
    if out.grad_entropy is not None:
        logp = tl.load(out.logps + r, mask=real, other=0.0)
        entropy = tl.load(out.entropy + r, mask=real, other=0.0)
        g_entropy = tl.load(out.grad_entropy + r, mask=real, other=0.0)
        log_p = tl.where(is_label, logp[:, None], shifted * LN2)
        p = tl.where(is_label, (1 - miss)[:, None], p)
        gradient -= tl.where(p > 0, p * (log_p + entropy[:, None]) * g_entropy[:, None], 0.0)
    if scoring.softcap is not None:
        gradient *= slope
    # Not a product with the mask: a row whose lse is NaN must not leak into the columns past the vocabulary.
    gradient = tl.where((c < scoring.vocabulary)[None, :], gradient, 0.0)
    store_gradient(gradient, r, c - begin, row // ROWS, scoring, out)


@triton.jit
def store_gradient(gradient, r, place, block, scoring, out):
    """(ROWS, STRIP) of dS at rows r and columns `place` of the slice, and its column sums for block `block` of rows."""
    real = r < scoring.rows
    places = out.d_logits + r.to(tl.int64)[:, None] * out.width + place[None, :]
    tl.store(places, narrow(gradient, out.d_logits.dtype.element_ty), mask=real[:, None])
    if out.d_bias is not None:
        if out.row_scale is not None:
            gradient *= tl.load(out.row_scale + r, mask=real, other=0.0)[:, None]
        sums = tl.sum(tl.where(real[:, None], gradient, 0.0), 0)
        tl.store(out.d_bias + block.to(tl.int64) * out.width + place, sums)

"""End of the head's forward: merge the strips' statistics into every row's log-probability.

    L = log2 sum_j 2^strip_lse[j]  (label left out)      d = L - u_y
    logp = -ln(1 + 2^d)      lse = L + log2(1 + 2^-d)      miss = 1 - p_y = 1 / (1 + 2^-d)
    entropy = sum_j q_j (entropy_j - log q_j) - p_y log p_y,       q_j = 2^(strip_lse[j] - lse)

Reads 4 N bytes per strip of columns two times (three with entropy), mostly from L2. One program per block of rows.
The chain rule adds terms that are never negative, where lse - sum p z would cancel at large logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..numerics import LN2, LOG2E, log1p
from .problem import Problem, RowStatistics, StripStatistics


@triton.jit
def _merge_kernel(
    strip_lse, strip_entropy, label_score, labels, logps, lse, miss, entropy, rows, strips, ignore_index,
    ROWS: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    maximum = tl.full((ROWS,), -1e30, tl.float32)  # finite: with one token there is nothing but the label
    for first in range(0, strips, STRIPS):
        t = first + tl.arange(0, STRIPS)
        inside = (t < strips)[:, None] & real[None, :]
        values = tl.load(
            strip_lse + t.to(tl.int64)[:, None] * rows + r[None, :], mask=inside, other=float("-inf")
        )
        maximum = tl.maximum(maximum, tl.max(values, 0))
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, strips, STRIPS):
        t = first + tl.arange(0, STRIPS)
        inside = (t < strips)[:, None] & real[None, :]
        values = tl.load(
            strip_lse + t.to(tl.int64)[:, None] * rows + r[None, :], mask=inside, other=float("-inf")
        )
        total += tl.sum(tl.exp2(values - maximum[None, :]), 0)
    others = maximum + tl.log2(total)
    # A label outside the vocabulary never wrote its score, which is still NaN, and so is all of its row.
    label = tl.load(label_score + r, mask=real, other=0.0)
    difference = others - label
    small = tl.exp2(-tl.abs(difference))
    tail = log1p(small)
    inverse = 1 / (1 + small)
    row_logp = -(tl.maximum(difference, 0.0) * LN2 + tail)
    row_lse = tl.maximum(others, label) + tail * LOG2E
    row_miss = tl.where(difference >= 0, inverse, small * inverse)
    ignored = tl.load(labels + r, mask=real, other=0).to(tl.int64) == ignore_index
    tl.store(logps + r, tl.where(ignored, 0.0, row_logp), mask=real)
    tl.store(lse + r, tl.where(ignored, 1e30, row_lse), mask=real)  # every probability of the row becomes 0
    tl.store(miss + r, tl.where(ignored, 0.0, row_miss), mask=real)
    if entropy is not None:
        bits = tl.zeros((ROWS,), tl.float32)
        for first in range(0, strips, STRIPS):
            t = first + tl.arange(0, STRIPS)
            inside = (t < strips)[:, None] & real[None, :]
            place = t.to(tl.int64)[:, None] * rows + r[None, :]
            log_share = tl.load(strip_lse + place, mask=inside, other=float("-inf")) - row_lse[None, :]
            within = tl.load(strip_entropy + place, mask=inside, other=0.0)
            share = tl.exp2(log_share)
            bits += tl.sum(tl.where(share == 0, 0.0, share * (within - log_share)), 0)
        row_entropy = bits * LN2 - (1 - row_miss) * row_logp
        tl.store(entropy + r, tl.where(ignored, 0.0, row_entropy), mask=real)


def merge_strips(problem: Problem, statistics: StripStatistics) -> RowStatistics:
    strips, rows = statistics.lse.shape
    logps, lse, miss = (statistics.label_score.new_empty(rows) for _ in range(3))
    entropy = None if statistics.entropy is None else statistics.label_score.new_empty(rows)
    _merge_kernel[(triton.cdiv(rows, 32),)](
        statistics.lse, statistics.entropy, statistics.label_score, problem.labels, logps, lse, miss, entropy,
        rows, strips, problem.options.ignore_index, ROWS=32, STRIPS=64, num_warps=4,
    )  # fmt: skip
    return RowStatistics(logps, lse, miss, entropy)

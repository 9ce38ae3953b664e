"""End of the head's forward: merge the strips' statistics into every row's log-probability.

    M = max_j maximum[j]      total = sum_j 2^((maximum[j] - M) scale) total[j]      (label left out)
    d = log2 total + (M - z_y) scale
    logp = -ln(1 + 2^d)      1 - p_y = 1 / (1 + 2^-d)      log_sum = log2 sum_v 2^((z_v - max(M, z_y)) scale)
    entropy = log_sum - sum_v p_v (z_v - max(M, z_y)) scale, of terms that are never negative and do not cancel

Reads 8 N bytes per strip of columns, mostly from L2, the maxima twice. One program per block of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..numerics import LN2, LOG2E, log1p
from .problem import Problem, RowStatistics, StripStatistics
from .tiles import load_scale, rows_to_compute


@triton.jit
def _load(table, first, r, rows, strips, inside, other, STRIPS: tl.constexpr):
    """(STRIPS, ROWS) of a (strips, rows) table."""
    t = first + tl.arange(0, STRIPS)
    place = table + t.to(tl.int64)[:, None] * rows + r[None, :]
    return tl.load(place, mask=(t < strips)[:, None] & inside[None, :], other=other)


@triton.jit
def _merge_kernel(tables, label_logit, scoring, out, strips, ROWS: tl.constexpr, STRIPS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    r = row + tl.arange(0, ROWS)
    rows = scoring.rows
    real = r < rows_to_compute(scoring)
    scale = load_scale(scoring, r)
    others = tl.full((ROWS,), -1e30, tl.float32)  # finite: with one token there is nothing but the label
    for first in range(0, strips, STRIPS):
        values = _load(tables.maximum, first, r, rows, strips, real, float("-inf"), STRIPS)
        others = tl.maximum(others, tl.max(values, 0))
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), 2147483647, tl.int32)
    for first in range(0, strips, STRIPS):
        maximum = _load(tables.maximum, first, r, rows, strips, real, -1e30, STRIPS)
        distance = (maximum - others[None, :]) * scale[None, :]
        share = tl.exp2(distance)
        of_strip = _load(tables.total, first, r, rows, strips, real, 0.0, STRIPS)
        total += tl.sum(share * of_strip, 0)
        if tables.weighted is not None:
            more = _load(tables.weighted, first, r, rows, strips, real, 0.0, STRIPS)
            weighted += tl.sum(tl.where(of_strip > 0, share * (more + of_strip * distance), 0.0), 0)
        if tables.squares is not None:
            squares += tl.sum(share * share * _load(tables.squares, first, r, rows, strips, real, 0.0, STRIPS), 0)
        if tables.mean is not None:
            mean += tl.sum(_load(tables.mean, first, r, rows, strips, real, 0.0, STRIPS), 0)
        if tables.top is not None:
            tokens = _load(tables.top, first, r, rows, strips, real, 2147483647, STRIPS)
            top = tl.minimum(top, tl.min(tl.where(maximum == others[None, :], tokens, 2147483647), 0))
    # A label outside the vocabulary never wrote its logit, which is still NaN, and so is all of its row.
    label = tl.load(label_logit + r, mask=real, other=0.0)
    difference = tl.log2(total) + (others - label) * scale
    small = tl.exp2(-tl.abs(difference))
    tail = log1p(small)
    inverse = 1 / (1 + small)
    logp = -(tl.maximum(difference, 0.0) * LN2 + tail)
    largest = tl.where(label >= others, label, tl.where(label < others, others, label))  # NaN stays
    of_others = tl.minimum((others - largest) * scale, 0.0)
    of_label = (label - largest) * scale
    # Where the label is the largest, log(1 + the others) = -logp keeps its digits.
    log_sum = tl.where(label >= others, -logp * LOG2E, tl.log2(total * tl.exp2(of_others) + tl.exp2(of_label)))
    tl.store(out.logps + r, logp, mask=real)
    tl.store(out.maximum + r, largest, mask=real)
    tl.store(out.log_sum + r, log_sum, mask=real)
    tl.store(out.miss + r, tl.where(difference >= 0, inverse, small * inverse), mask=real)
    if out.lse is not None:
        tl.store(out.lse + r, (largest * scale + log_sum) * LN2, mask=real)
    if out.entropy is not None:
        weighted = tl.where(total > 0, tl.exp2(of_others) * (weighted + total * of_others), 0.0)
        at_label = tl.exp2(of_label)
        weighted += tl.where(at_label > 0, at_label * of_label, 0.0)
        tl.store(out.entropy + r, (log_sum - weighted * tl.exp2(-log_sum)) * LN2, mask=real)
    if out.log_sum_p2 is not None:
        squares = squares * tl.exp2(2 * of_others) + tl.exp2(2 * of_label)
        tl.store(out.log_sum_p2 + r, (tl.log2(squares) - 2 * log_sum) * LN2, mask=real)
    if out.mean_logit is not None:
        tl.store(out.mean_logit + r, mean * scale * LN2, mask=real)
    if out.top1 is not None:
        token = tl.load(scoring.labels + r, mask=real, other=0)
        label_is_top = (label > others) | (label == others) & (token < top)  # the first of equal ones
        tl.store(out.top1 + r, tl.where(label_is_top, token, top.to(tl.int64)), mask=real)


def merge_strips(problem: Problem, statistics: StripStatistics) -> RowStatistics:
    strips, rows = statistics.tables.maximum.shape
    wants = problem.options.wants

    def new(wanted: bool = True) -> torch.Tensor | None:
        return statistics.label_logit.new_empty(rows) if wanted else None

    out = RowStatistics(
        new(), new(), new(), new(), new(wants("entropy")), new(wants("lse")), new(wants("mean_logit")),
        problem.labels.new_empty(rows) if wants("top1") else None, new(wants("log_sum_p2")),
    )  # fmt: skip
    block = 1 if rows == 1 else 32  # the row alone: strips are its neighbours in memory, and 32 rows would spill
    _merge_kernel[(triton.cdiv(rows, block),)](
        statistics.tables, statistics.label_logit, problem.scoring, out, strips, ROWS=block, STRIPS=64, num_warps=4
    )
    return out

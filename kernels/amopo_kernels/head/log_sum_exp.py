"""Forward epilogue of the head: what is kept of a strip of logits, none of which reaches memory.

    maximum[j, n] = max_{v in strip j, v != y_n} z_nv         total[j, n] = sum 2^((z_nv - maximum[j, n]) scale)
    label_logit[n] = z_{n, y_n}

Writes 8 bytes a row and strip, 4 more for every other statistic. Each (row, strip) is written by one program, so that
the result does not depend on the number of programs. `merge_strips.py` merges strips. Optionally the strip's
exponentials are kept, for a backward that does not recompute the logits (see `passes.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .problem import Exponentials, StripStatistics, Tables
from .tiles import (
    load_labels,
    load_mean_shares,
    load_scale,
    logit_tile,
    may_hold_a_label,
    narrow,
    rows_to_compute,
)


class LogSumExp(NamedTuple):
    """Where the epilogue writes; None: not wanted. Fields as in StripStatistics and Exponentials."""

    tables: Tables
    label_logit: Tensor
    exponentials: Tensor | None
    stride: int  # of its rows
    reference: Tensor | None
    limit: float

    @staticmethod
    def of(statistics: StripStatistics, kept: Exponentials | None) -> LogSumExp:
        where = (None, 0, None, 0.0) if kept is None else (kept.out, kept.out.stride(0), kept.reference, kept.limit)
        return LogSumExp(statistics.tables, statistics.label_logit, *where)


@triton.jit
def finish_log_sum_exp(products, r, c, column, scoring, out, STRIP: tl.constexpr):
    """One strip, (ROWS, STRIP) products x . w of rows r and columns c, from `column` on. Returns what is to be kept."""
    rows = rows_to_compute(scoring)
    z, slope = logit_tile(products, c, scoring)
    label = load_labels(scoring, r)
    here = (label >= column) & (label < column + STRIP)
    place = (column // STRIP).to(tl.int64) * scoring.rows + r
    # The last tile may have whole strips past the vocabulary.
    counts = r < tl.where(column < scoring.vocabulary, rows, 0)
    if out.tables.mean is not None:
        shares = load_mean_shares(scoring, c)[None, :]
        tl.store(out.tables.mean + place, tl.sum(tl.where(shares != 0, z * shares, 0.0), 1), mask=counts)
    z = tl.where((c >= scoring.vocabulary)[None, :], float("-inf"), z)
    if may_hold_a_label(here, scoring):
        is_label = c[None, :] == label[:, None]
        tl.store(out.label_logit + r, tl.sum(tl.where(is_label, z, 0.0), 1), mask=here & (r < rows))
        z = tl.where(is_label, float("-inf"), z)
    maximum = tl.maximum(tl.max(z, 1), -1e30)  # finite, so that a strip of nothing but the label gives 0 and not NaN
    if out.tables.top is not None:
        best = tl.where(z == maximum[:, None], c[None, :], 2147483647)
        tl.store(out.tables.top + place, tl.min(best, 1), mask=counts)
    scale = load_scale(scoring, r)
    exponents = (z - maximum[:, None]) * scale[:, None]
    exponentials = tl.exp2(exponents)
    tl.store(out.tables.maximum + place, maximum, mask=counts)
    tl.store(out.tables.total + place, tl.sum(exponentials, 1), mask=counts)
    if out.tables.weighted is not None:
        weighted = tl.where(exponentials > 0, exponentials * exponents, 0.0)
        tl.store(out.tables.weighted + place, tl.sum(weighted, 1), mask=counts)
    if out.tables.squares is not None:
        tl.store(out.tables.squares + place, tl.sum(exponentials * exponentials, 1), mask=counts)
    if out.exponentials is not None:
        if out.reference is not None:
            reference = tl.load(out.reference + r, mask=r < rows, other=0.0)
            base = tl.where((maximum - reference) * scale > out.limit, maximum, reference)
            exponentials *= tl.exp2((maximum - base) * scale)[:, None]
        if scoring.softcap is not None:
            exponentials *= slope
    return exponentials


@triton.jit
def store_exponentials(exponentials, r, c, begin, scoring, out):
    """What finish_log_sum_exp returned, of a slice from `begin` on."""
    kept = narrow(exponentials, out.exponentials.dtype.element_ty)
    first_of_row = out.exponentials + r.to(tl.int64)[:, None] * out.stride
    if out.reference is not None:  # a slice's buffer, which holds whole tiles of rows: a mask costs registers
        tl.store(first_of_row + (c - begin)[None, :], kept)
    else:
        tl.store(first_of_row + c[None, :], kept, mask=(r < rows_to_compute(scoring))[:, None])

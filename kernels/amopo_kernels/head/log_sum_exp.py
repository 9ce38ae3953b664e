"""Forward epilogue of the head: what is kept of a strip of scores, none of which reaches memory.

    strip_lse[j, n] = log2 sum_{v in strip j, v != y_n} 2^u_nv          label_score[n] = u_{n, y_n}

Writes 4 bytes a row and strip, twice with entropy. Each (row, strip) is written by one program, so that the result
does not depend on the number of programs. `merge_strips.py` merges strips. Optionally the strip's probabilities are
kept, for a backward that does not recompute the scores (see `passes.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .problem import Probabilities, StripStatistics
from .tiles import load_labels, narrow, score_tile


class LogSumExp(NamedTuple):
    """Where the epilogue writes; None: not wanted. Fields as in StripStatistics and Probabilities."""

    strip_lse: Tensor
    strip_entropy: Tensor | None
    label_score: Tensor
    probabilities: Tensor | None
    probabilities_stride: int
    reference: Tensor | None
    limit: float

    @staticmethod
    def of(statistics: StripStatistics, probabilities: Probabilities | None) -> LogSumExp:
        kept = (None, 0, None, 0.0)
        if probabilities is not None:
            kept = (probabilities.out, probabilities.out.stride(0), probabilities.reference, probabilities.limit)
        return LogSumExp(statistics.lse, statistics.entropy, statistics.label_score, *kept)


@triton.jit
def _strip_statistics(u, ENTROPY: tl.constexpr):
    """Per row (log2 sum 2^u, entropy in bits, maximum, 2^(u - maximum)); u = -inf adds nothing."""
    maximum = tl.maximum(tl.max(u, 1), -1e30)  # finite, so that a strip of nothing but the label gives 0 and not NaN
    shifted = u - maximum[:, None]
    exponentials = tl.exp2(shifted)
    total = tl.sum(exponentials, 1)
    lse = maximum + tl.log2(total)
    entropy = total
    if ENTROPY:
        weighted = tl.sum(tl.where(exponentials > 0, exponentials * shifted, 0.0), 1)
        entropy = tl.where(total > 0, tl.log2(total) - weighted / total, 0.0)
    return lse, entropy, maximum, exponentials


@triton.jit
def finish_log_sum_exp(logits, row, column, begin, scoring, out, ROWS: tl.constexpr, STRIP: tl.constexpr):
    """One strip, (ROWS, STRIP) logits without bias at (row, column); `begin` is the first column of the slice."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, STRIP)
    u, slope = score_tile(logits, c, scoring)
    label = load_labels(scoring, row, ROWS)
    is_label = c[None, :] == label[:, None]
    here = (label >= column) & (label < column + STRIP)
    tl.store(out.label_score + r, tl.sum(tl.where(is_label, u, 0.0), 1), mask=here)
    u = tl.where(is_label | (c >= scoring.vocabulary)[None, :], float("-inf"), u)
    lse, entropy, maximum, exponentials = _strip_statistics(u, out.strip_entropy is not None)
    place = (column // STRIP).to(tl.int64) * scoring.rows + r
    # The last tile may have whole strips past the vocabulary.
    counts = r < tl.where(column < scoring.vocabulary, scoring.rows, 0)
    tl.store(out.strip_lse + place, lse, mask=counts)
    if out.strip_entropy is not None:
        tl.store(out.strip_entropy + place, entropy, mask=counts)
    if out.probabilities is not None:
        base = lse
        if out.reference is not None:
            reference = tl.load(out.reference + r, mask=r < scoring.rows, other=0.0)
            base = tl.where(lse - reference > out.limit, lse, reference)
        # A strip without anything but the label has lse = -inf; maximum - base must not be inf.
        p = exponentials * tl.exp2(maximum - tl.maximum(base, -1e30))[:, None]
        if scoring.softcap is not None:
            p *= slope
        places = out.probabilities + r.to(tl.int64)[:, None] * out.probabilities_stride + (c - begin)[None, :]
        tl.store(places, narrow(p, out.probabilities.dtype.element_ty), mask=(r < scoring.rows)[:, None])

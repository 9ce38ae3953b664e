"""End of the head's forward: merge the tiles' statistics into every row's log-probability.

    L = log2 sum_j 2^tile_lse[j]  (label left out)      d = L - u_y
    logp = -ln(1 + 2^d)      lse = L + log2(1 + 2^-d)      miss = 1 - p_y = 1 / (1 + 2^-d)
    entropy = sum_j q_j (entropy_j - log q_j) - p_y log p_y,       q_j = 2^(tile_lse[j] - lse)

Reads 4 N bytes per strip of columns two times (three with entropy), mostly from L2. One program per block of rows.
The chain rule adds terms that are never negative, where lse - sum p z would cancel at large logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..numerics import LN2, LOG2E, log1p


@triton.jit
def _merge_kernel(
    tile_lse, tile_entropy, label_score, labels, logps, lse, miss, entropy, rows, tiles, ignore_index,
    ROWS: tl.constexpr, TILES: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    maximum = tl.full((ROWS,), -1e30, tl.float32)  # finite: with one token there is nothing but the label
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        inside = (t < tiles)[:, None] & real[None, :]
        values = tl.load(
            tile_lse + t.to(tl.int64)[:, None] * rows + r[None, :], mask=inside, other=float("-inf")
        )
        maximum = tl.maximum(maximum, tl.max(values, 0))
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        inside = (t < tiles)[:, None] & real[None, :]
        values = tl.load(
            tile_lse + t.to(tl.int64)[:, None] * rows + r[None, :], mask=inside, other=float("-inf")
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
    if ENTROPY:
        bits = tl.zeros((ROWS,), tl.float32)
        for first in range(0, tiles, TILES):
            t = first + tl.arange(0, TILES)
            inside = (t < tiles)[:, None] & real[None, :]
            place = t.to(tl.int64)[:, None] * rows + r[None, :]
            log_share = tl.load(tile_lse + place, mask=inside, other=float("-inf")) - row_lse[None, :]
            within = tl.load(tile_entropy + place, mask=inside, other=0.0)
            share = tl.exp2(log_share)
            bits += tl.sum(tl.where(share == 0, 0.0, share * (within - log_share)), 0)
        row_entropy = bits * LN2 - (1 - row_miss) * row_logp
        tl.store(entropy + r, tl.where(ignored, 0.0, row_entropy), mask=real)


def merge_tiles(
    tile_lse: Tensor,  # (tiles, N)
    tile_entropy: Tensor | None,  # (tiles, N)
    label_score: Tensor,  # (N,) NaN where no tile holds the label
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logps, lse in bits, miss, entropy), each (N,) float32."""
    tiles, rows = tile_lse.shape
    logps, lse, miss = (label_score.new_empty(rows) for _ in range(3))
    entropy = label_score.new_empty(rows) if tile_entropy is not None else None
    _merge_kernel[(triton.cdiv(rows, 32),)](
        tile_lse, tile_entropy, label_score, labels, logps, lse, miss, entropy, rows, tiles, ignore_index,
        ROWS=32, TILES=64, ENTROPY=entropy is not None, num_warps=4,
    )  # fmt: skip
    return logps, lse, miss, entropy

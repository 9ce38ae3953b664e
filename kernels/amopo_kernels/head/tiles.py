"""What every Triton kernel of the head shares: tiles of scores, their statistics and their gradient.

A score is u = log2(e) * cap(x . w_v + b_v) / temperature, so that 2^u is the exponential of the logit. The label is
left out of every sum: its score comes from the same accumulator, and 1 - p_y keeps its digits where p_y rounds to 1.
Columns past the vocabulary score -inf. Dot products accumulate in float32; nothing here uses an atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..numerics import LN2, LOG2E

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def grouped_tile(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile): all columns for GROUP row tiles, so that these rows stay in L2."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = min(row_tiles - first, GROUP)
    inside = tile % per_group
    return first + inside % height, inside // height


@triton.jit
def load_tile(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """source[row : row + ROWS, column : column + COLUMNS] of a (rows, columns) matrix, 0 outside."""
    if DESCRIPTORS:
        values = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        values = tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return values


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # which multiplies the raw bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """float32 values rounded to the nearest of a storage dtype."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # which truncates
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def capped(logits, softcap):
    """(softcap * tanh(logits / softcap), its derivative), exact at both ends: 1 - tanh^2 would cancel near 1."""
    small = tl.exp2(tl.abs(logits) * (-2 * LOG2E / softcap))
    inverse = 1 / (1 + small)
    size = softcap * (1 - small) * inverse
    return tl.where(logits < 0, -size, size), 4 * small * inverse * inverse


@triton.jit
def score_tile(logits, columns, vocabulary, bias, softcap, scale, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """float32 logits without bias -> (u, derivative of cap)."""
    slope = logits
    if BIAS:
        logits += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        logits, slope = capped(logits, softcap)
    return logits * scale, slope


@triton.jit
def load_labels(labels, row, rows, vocabulary, ROWS: tl.constexpr):
    """int32 labels, -1 where there is none in the vocabulary: ignored, out of range, or past the last row."""
    r = row + tl.arange(0, ROWS)
    values = tl.load(labels + r, mask=r < rows, other=-1).to(tl.int64)
    return tl.where((values >= 0) & (values < vocabulary), values, -1).to(tl.int32)


@triton.jit
def _halve(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def strips_of(tile, STRIPS: tl.constexpr):
    """A tuple of 1, 2, 4 or 8 strips of columns. Finishing them in turn keeps few of a tile's values in registers."""
    if STRIPS == 1:
        strips = (tile,)
    elif STRIPS == 2:
        strips = _halve(tile)
    else:
        left, right = _halve(tile)
        strips = strips_of(left, STRIPS // 2) + strips_of(right, STRIPS // 2)
    return strips


@triton.jit
def tile_statistics(u, ENTROPY: tl.constexpr):
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
def tile_probabilities(lse, maximum, exponentials, reference, headroom_limit, RELATIVE_TO_ROW: tl.constexpr):
    """2^(u - base): base is the tile's own lse, or the row's reference unless the tile exceeds it by the limit."""
    base = lse
    if RELATIVE_TO_ROW:
        base = tl.where(lse - reference > headroom_limit, lse, reference)
    # A tile without anything but the label has lse = -inf; maximum - base must not be inf.
    return exponentials * tl.exp2(maximum - tl.maximum(base, -1e30))[:, None]


@triton.jit
def score_gradient(
    u, slope, is_label, inside, lse, miss, logp, entropy, g, g_entropy, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):
    """d loss / d logit, (rows, columns): g * (1[y] - p), and -g_entropy * p * (log p + entropy), times the cap's slope.

    lse in bits, logp and entropy in nats, miss = 1 - p_y; g and g_entropy hold 1 / temperature.
    """
    shifted = u - lse[:, None]
    p = tl.exp2(shifted)
    gradient = tl.where(is_label, miss[:, None], -p) * g[:, None]
    if ENTROPY:
        log_p = tl.where(is_label, logp[:, None], shifted * LN2)
        p = tl.where(is_label, (1 - miss)[:, None], p)
        gradient -= tl.where(p > 0, p * (log_p + entropy[:, None]) * g_entropy[:, None], 0.0)
    if SOFTCAP:
        gradient *= slope
    # Not a product with `inside`: a row whose lse is NaN must not leak into the columns past the vocabulary.
    return tl.where(inside, gradient, 0.0)

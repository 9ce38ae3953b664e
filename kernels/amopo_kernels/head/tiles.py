"""Device functions that the head's kernels share: tiles of operands, tiles of scores, strips of a tile.

A logit is z = cap(x . w_v + b_v), a score in bits (z - reference) * scale with scale = log2(e) / temperature: the
difference comes first, since logits that have much in common leave few digits to a product. The label is left out of
every sum: its logit comes from the same accumulator, and 1 - p_y keeps its digits where p_y rounds to 1. Columns past
the vocabulary count as -inf. Dot products accumulate in float32; nothing here uses an atomic.

Functions that take the numbers of their rows and columns, instead of making them, are called from Gluon too, where a
range has a layout (warp_specialized.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..numerics import LOG2E

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
def logit_tile(products, columns, scoring):
    """float32 products x . w -> (logits, derivative of cap). `scoring` is a problem.Scoring."""
    slope = products
    if scoring.bias is not None:
        bias = tl.load(scoring.bias + columns, mask=columns < scoring.vocabulary, other=0.0)
        products += bias.to(tl.float32)[None, :]
    if scoring.softcap is not None:
        products, slope = capped(products, scoring.softcap)
    return products, slope


@triton.jit
def rows_to_compute(scoring):
    rows = scoring.rows
    if scoring.count is not None:
        rows = tl.load(scoring.count)
    return rows


@triton.jit
def load_scale(scoring, r):
    """(ROWS,) from differences of logits to bits, of rows r."""
    scale = tl.where(r == r, scoring.scale, 0.0)  # which Gluon gives the layout of r
    if scoring.row_scale is not None:
        scale = tl.load(scoring.row_scale + r, mask=r < scoring.rows, other=1.0)
    return scale


@triton.jit
def load_mean_shares(scoring, columns):
    """(COLUMNS,) of the tokens in the mean of the logits, 0 past the vocabulary."""
    inside = columns < scoring.vocabulary
    shares = tl.where(inside, scoring.mean_share, 0.0)
    if scoring.mean_shares is not None:
        shares = tl.load(scoring.mean_shares + columns, mask=inside, other=0.0)
    return shares


@triton.jit
def load_labels(scoring, r):
    """int32 labels of rows r, -1 where there is none in the vocabulary: ignored, out of range, or past the last row."""
    values = tl.load(scoring.labels + r, mask=r < scoring.rows, other=-1).to(tl.int64)
    return tl.where((values >= 0) & (values < scoring.vocabulary), values, -1).to(tl.int32)


@triton.jit
def may_hold_a_label(here, scoring):
    """Whether a strip needs a label's arithmetic, `here` being its rows with a label: the same for all of a block.

    With a softcap always: triton 3.6 spills where the branch meets its slope and a temperature a row.
    """
    if scoring.softcap is not None:
        found = True
    else:
        found = tl.max(here.to(tl.int32), 0) > 0
    return found


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

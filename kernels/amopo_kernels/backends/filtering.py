"""Filtered gradients: which tiles of the scores a backward computes, decided before anything is recomputed.

    mass[i, j] = sum_{n in row tile i} |g_n| 2^(tile_lse[j, n] - lse_n)          without the labels' terms

A tile whose mass is at most TOLERANCE times the largest |g| of the call is dropped; if it holds the label of one of its
rows, it keeps that entry of dS and is not recomputed. The mass is exact (with a softcap: an upper bound), so the
dropped share of the gradient is known and reported.

Reads the forward's tile_lse once (4 N V / strip bytes), writes lists of tiles for the three kernels of the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .problem import Problem, RowStatistics
from .tiles import load_labels

# With 594 tiles of 256 columns at V = 152064, less than 0.2 % of the largest row's gradient can be dropped per row on
# average over a tile's rows: what rounding dS to bfloat16 costs.
TOLERANCE = 2.0**-12
RECOMPUTED, ONLY_LABELS = 1, 2


@dataclass(frozen=True)
class SliceSelection:
    """The tiles of one slice. Lists name row tiles, or column tiles of the slice; their first `count` entries hold."""

    state: Tensor  # (row tiles, column tiles) int32: 0, RECOMPUTED or ONLY_LABELS
    tiles: Tensor  # (column tiles * row tiles,) int32: column tile * row tiles + row tile
    tile_count: Tensor  # () int32
    row_lists: Tensor  # (column tiles, row tiles) int32
    row_counts: Tensor  # (column tiles,) int32
    column_lists: Tensor  # (row tiles, column tiles) int32
    column_counts: Tensor  # (row tiles,) int32


@triton.jit
def _mass_kernel(
    tile_lse, lse, grad, labels, mass, has_label, rows, vocabulary, strips, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    tile = tl.program_id(1)
    r = row + tl.arange(0, ROWS)
    real = r < rows
    row_lse = tl.load(lse + r, mask=real, other=0.0)
    p = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(COLUMNS // STRIP):
        strip = tile * (COLUMNS // STRIP) + i
        here = r < tl.where(strip < strips, rows, 0)
        values = tl.load(tile_lse + strip.to(tl.int64) * rows + r, mask=here, other=float("-inf"))
        p += tl.exp2(values - row_lse)
    g = tl.abs(tl.load(grad + r, mask=real, other=0.0))
    label = load_labels(labels, row, rows, vocabulary, ROWS)
    held = (label >= tile * COLUMNS) & (label < (tile + 1) * COLUMNS)
    place = tl.program_id(0) * column_tiles + tile
    tl.store(mass + place, tl.sum(tl.where(real, g * p, 0.0), 0))
    tl.store(has_label + place, tl.max(held.to(tl.int32), 0))


def select(
    problem: Problem,
    rows: RowStatistics,
    tile_lse: Tensor,  # (strips, N) float32
    strip: int,
    grad: Tensor,  # (N,) float32
    slice_columns: int,
) -> tuple[list[SliceSelection], Tensor]:
    """(a selection per slice, float32 (3,): shares of tiles recomputed and multiplied, dropped share of the mass)."""
    tile = launch.configuration(problem).scores
    row_tiles = triton.cdiv(problem.rows, tile.rows)
    column_tiles = triton.cdiv(problem.vocabulary, tile.columns)
    mass = torch.empty(row_tiles, column_tiles, dtype=torch.float32, device=grad.device)
    has_label = torch.empty(row_tiles, column_tiles, dtype=torch.int32, device=grad.device)
    _mass_kernel[(row_tiles, column_tiles)](
        tile_lse, rows.lse, grad, problem.labels, mass, has_label, problem.rows, problem.vocabulary,
        tile_lse.shape[0], column_tiles, ROWS=tile.rows, COLUMNS=tile.columns, STRIP=strip, num_warps=4,
    )  # fmt: skip
    negligible = mass <= TOLERANCE * grad.abs().amax()  # NaN is not
    # The label's entry without its score is only known without a softcap.
    alone = RECOMPUTED if problem.softcap is not None else ONLY_LABELS
    state = torch.where(negligible, has_label * alone, RECOMPUTED).int()
    dropped = torch.where(state == RECOMPUTED, 0.0, mass).sum() / (grad.abs() * rows.miss).sum()
    shares = torch.stack([(state == RECOMPUTED).float().mean(), (state != 0).float().mean(), dropped])

    per_slice = slice_columns // tile.columns
    slices = triton.cdiv(column_tiles, per_slice)
    padded = torch.nn.functional.pad(state, (0, slices * per_slice - column_tiles))
    by_row = padded.view(row_tiles, slices, per_slice).transpose(0, 1).contiguous()  # (slices, row, column)
    by_column = by_row.transpose(1, 2).contiguous()  # (slices, column, row)

    def lists(states: Tensor) -> tuple[Tensor, Tensor]:
        return (states == 0).int().argsort(dim=-1, stable=True).int(), (states != 0).sum(-1).int()

    tiles, tile_counts = lists(by_column.view(slices, -1))
    row_lists, row_counts = lists(by_column)
    column_lists, column_counts = lists(by_row)
    selections = [
        SliceSelection(*parts)
        for parts in zip(
            by_row, tiles, tile_counts, row_lists, row_counts, column_lists, column_counts, strict=True
        )
    ]  # fmt: skip
    return selections, shares

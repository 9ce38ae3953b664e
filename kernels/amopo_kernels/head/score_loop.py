"""Forward of the head: statistics of every tile of scores, none of which reaches memory.

    u = log2(e) cap(X W^T + b) / temperature
    tile_lse[j, n] = log2 sum_{v in tile j, v != y_n} 2^u_nv          label_score[n] = u_{n, y_n}

Work: 2 N V H FLOP. Reads X and W (W once per group of row tiles), writes 4 N V / STRIP bytes of tile_lse.
Order: a persistent grid walks the tiles, GROUP row tiles together, columns outermost. Each (row, strip of columns) is
written by one program, so that the result does not depend on the number of programs. `merge_strips.py` merges strips.
Optionally the strip's probabilities are kept, for a backward that does not recompute the scores (see `passes.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .problem import Probabilities, Problem, TileStatistics
from .tiles import (
    dot,
    grouped_tile,
    load_labels,
    load_tile,
    narrow,
    score_tile,
    strips_of,
    tile_probabilities,
    tile_statistics,
)


@triton.jit
def finish_scores(
    accumulator, row, column, bias, labels, tile_lse, tile_entropy, label_score, probabilities, reference,
    rows, vocabulary, begin, probabilities_stride, softcap, scale, limit,
    ROWS: tl.constexpr, STRIP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    PROBABILITIES: tl.constexpr, RELATIVE_TO_ROW: tl.constexpr,
):  # fmt: skip
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, STRIP)
    u, slope = score_tile(accumulator, c, vocabulary, bias, softcap, scale, BIAS, SOFTCAP)
    label = load_labels(labels, row, rows, vocabulary, ROWS)
    is_label = c[None, :] == label[:, None]
    here = (label >= column) & (label < column + STRIP)
    tl.store(label_score + r, tl.sum(tl.where(is_label, u, 0.0), 1), mask=here)
    u = tl.where(is_label | (c >= vocabulary)[None, :], float("-inf"), u)
    lse, entropy, maximum, exponentials = tile_statistics(u, ENTROPY)
    place = (column // STRIP).to(tl.int64) * rows + r
    counts = r < tl.where(column < vocabulary, rows, 0)  # the last tile may have whole strips past the vocabulary
    tl.store(tile_lse + place, lse, mask=counts)
    if ENTROPY:
        tl.store(tile_entropy + place, entropy, mask=counts)
    if PROBABILITIES:
        base = lse
        if RELATIVE_TO_ROW:
            base = tl.load(reference + r, mask=r < rows, other=0.0)
        p = tile_probabilities(lse, maximum, exponentials, base, limit, RELATIVE_TO_ROW)
        if SOFTCAP:
            p *= slope
        places = probabilities + r.to(tl.int64)[:, None] * probabilities_stride + (c - begin)[None, :]
        tl.store(places, narrow(p, probabilities.dtype.element_ty), mask=(r < rows)[:, None])


@triton.jit
def _tile_lse_kernel(
    hidden, weight, bias, labels, tile_lse, tile_entropy, label_score, probabilities, reference,
    rows, vocabulary, features, begin, end, hidden_stride, weight_stride, probabilities_stride, softcap, scale, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PROBABILITIES: tl.constexpr,
    RELATIVE_TO_ROW: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(end - begin, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = begin + column_tile * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, features, DEPTH):
            x = load_tile(hidden, row, k, rows, features, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
            w = load_tile(weight, column, k, vocabulary, features, weight_stride, COLUMNS, DEPTH, DESCRIPTORS)
            accumulator = dot(x, w.T, accumulator, PRECISION)
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in tl.static_range(COLUMNS // STRIP):
            finish_scores(
                strips[i], row, column + i * STRIP, bias, labels, tile_lse, tile_entropy, label_score, probabilities,
                reference, rows, vocabulary, begin, probabilities_stride, softcap, scale, limit,
                ROWS, STRIP, BIAS, SOFTCAP, ENTROPY, PROBABILITIES, RELATIVE_TO_ROW,
            )  # fmt: skip


def strip_columns(device: torch.device, dtype: torch.dtype, narrow: bool) -> int:
    """Columns of a strip: what the epilogue can hold in registers besides the accumulators; `narrow` if it does more
    than the log-sum-exp."""
    return min(launch.tiles(device, dtype).scores.columns, 32 if narrow else 64)


def tile_lse(
    problem: Problem, begin: int, end: int, statistics: TileStatistics, probabilities: Probabilities | None = None
) -> None:
    """Fill `statistics` (and `probabilities`) for the columns begin to end; begin is a multiple of a tile's columns."""
    configuration = launch.configuration(problem)
    tile, descriptors = configuration.scores, configuration.descriptors
    out = probabilities.out if probabilities else None
    _tile_lse_kernel[launch.grid(problem, problem.rows, end - begin, tile)](
        launch.source(problem.hidden, (tile.rows, tile.depth), descriptors),
        launch.source(problem.weight, (tile.columns, tile.depth), descriptors),
        problem.bias, problem.labels, statistics.lse, statistics.entropy, statistics.label_score,
        out, probabilities.reference if probabilities else None,
        problem.rows, problem.vocabulary, problem.features, begin, end,
        problem.hidden.stride(0), problem.weight.stride(0), out.stride(0) if probabilities else 0,
        problem.softcap or 1.0, problem.scale, probabilities.limit if probabilities else 0.0,
        STRIP=statistics.strip, BIAS=problem.bias is not None, SOFTCAP=problem.softcap is not None,
        ENTROPY=statistics.entropy is not None, PROBABILITIES=probabilities is not None,
        RELATIVE_TO_ROW=probabilities is not None and probabilities.reference is not None,
        **launch.matmul(configuration, tile, problem.hidden.dtype),
    )  # fmt: skip

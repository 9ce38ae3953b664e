"""Backward of the head, step 2: what a slice of dS gives to the weight and to the hidden states.

    dW[slice]  = scale * dS^T X            written once, in the weight's dtype, straight into the gradient
    dX32     += dS W[slice]                float32

Work: 2 N H FLOP per column each. With dS resident in L2, memory sees X (again per slice), dW once, dX32 read and
written once per slice: 8 N H bytes. Order: persistent grids; a launch adds to each number once, so that sums are in
the order of the slices. Where N x H has fewer tiles than the GPU has processors, the sum over a slice's columns is
split and every split has a dX32 of its own, added up in the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .problem import Problem, Upstream
from .tiles import dot, grouped_tile, load_tile, narrow, strips_of


@triton.jit
def _first(rows, count):
    """How many rows to compute: `count` is Scoring.count."""
    if count is not None:
        rows = tl.load(count)
    return rows


@triton.jit
def _d_weight_kernel(
    begin, end, d_logits, hidden, d_weight, scale, count,
    rows, features, width, hidden_stride, d_weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(end - begin, ROWS)
    column_tiles = tl.cdiv(features, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        v = row_tile * ROWS
        h = column_tile * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, tl.cdiv(_first(rows, count), DEPTH)):  # a range of rows would spill in float32
            n = step * DEPTH
            s = load_tile(d_logits, n, v, rows, width, width, DEPTH, ROWS, DESCRIPTORS)
            x = load_tile(hidden, n, h, rows, features, hidden_stride, DEPTH, COLUMNS, DESCRIPTORS)
            accumulator = dot(s.T, x, accumulator, PRECISION)
        if scale is not None:
            accumulator *= tl.load(scale)
        r = begin + v + tl.arange(0, ROWS)
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in tl.static_range(COLUMNS // STRIP):
            c = h + i * STRIP + tl.arange(0, STRIP)
            places = d_weight + r.to(tl.int64)[:, None] * d_weight_stride + c[None, :]
            inside = (r < end)[:, None] & (c < features)[None, :]
            tl.store(places, narrow(strips[i], d_weight.dtype.element_ty), mask=inside)


@triton.jit
def _d_hidden_kernel(
    begin, end, d_logits, weight, d_hidden, count, splits,
    rows, features, width, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    IN_L2: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(_first(rows, count), ROWS)
    column_tiles = tl.cdiv(features, COLUMNS)
    tiles = row_tiles * column_tiles
    for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=DESCRIPTORS):
        split = index // tiles
        row_tile, column_tile = grouped_tile(index % tiles, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        h = column_tile * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        steps = tl.cdiv(end - begin, DEPTH)
        per_split = tl.cdiv(steps, splits)  # the same for every tile, or the two loops would not become one
        for i in range(0, per_split):
            step = split * per_split + i
            v = tl.where(step < steps, step * DEPTH, 1 << 30)  # past the last split's end: zeros
            s = load_tile(d_logits, row, v, rows, width, width, ROWS, DEPTH, DESCRIPTORS)
            w = load_tile(weight, begin + v, h, end, features, weight_stride, DEPTH, COLUMNS, DESCRIPTORS)
            accumulator = dot(s, w, accumulator, PRECISION)
        r = row + tl.arange(0, ROWS)
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in tl.static_range(COLUMNS // STRIP):
            if IN_L2:  # a tile's last rows may be the next split's first: their sums are 0
                d_hidden.atomic_add([split * rows + row, h + i * STRIP], strips[i])
            else:
                c = h + i * STRIP + tl.arange(0, STRIP)
                inside = (r < rows)[:, None] & (c < features)[None, :]
                places = d_hidden + (split * rows + r).to(tl.int64)[:, None] * features + c[None, :]
                tl.store(places, tl.load(places, mask=inside, other=0.0) + strips[i], mask=inside)


def d_weight(
    problem: Problem,
    d_logits: Tensor,  # (N, width), width >= the columns of a slice
    upstream: Upstream,
    out: Tensor,  # (V, H), the gradient
) -> launch.SliceLaunch:
    """Writes a slice's rows of `out`."""
    configuration = launch.configuration(problem)
    tile, descriptors = configuration.d_weight, configuration.descriptors
    hidden = upstream.hidden
    return launch.SliceLaunch(
        _d_weight_kernel,
        lambda columns: launch.grid(tile, hidden.device, columns, problem.features),
        launch.source(d_logits, (tile.depth, tile.rows), descriptors),
        launch.source(hidden, (tile.depth, tile.columns), descriptors), out, upstream.weight_scale, problem.count,
        problem.rows, problem.features, d_logits.stride(0), hidden.stride(0), out.stride(0),
        STRIP=min(tile.columns, 64), **launch.matmul(configuration, tile, hidden.dtype),
    )  # fmt: skip


def splits_of_d_hidden(tiles: int, processors: int) -> int:
    """How many parts of a slice's columns are summed apart, to fill the grid: of so many tiles of dX."""
    return max(1, processors // max(tiles, 1))


def new_d_hidden(problem: Problem) -> Tensor:
    """(splits, N, H) float32 zeros for `d_hidden`; their sum is dX32."""
    tile = launch.configuration(problem).d_hidden
    tiles = launch.blocks(problem.rows, tile.rows) * launch.blocks(problem.features, tile.columns)
    splits = splits_of_d_hidden(tiles, launch.processors(problem.hidden.device))
    return problem.hidden.new_zeros(splits, problem.rows, problem.features, dtype=torch.float32)


def d_hidden(
    problem: Problem,
    d_logits: Tensor,  # (N, width), width >= the columns of a slice
    out: Tensor,  # of new_d_hidden
) -> launch.SliceLaunch:
    """Adds a slice's part to `out`."""
    configuration = launch.configuration(problem)
    tile, descriptors = configuration.d_hidden, configuration.descriptors
    rows = problem.rows * out.shape[0]
    # Rows of no whole 16 numbers are read and written one by one, and need the registers.
    strip = min(tile.columns, 32 if problem.features % 16 else 64)
    in_l2 = configuration.add_in_l2 and descriptors
    return launch.SliceLaunch(
        _d_hidden_kernel,
        lambda _: launch.grid(tile, out.device, rows, problem.features),
        launch.source(d_logits, (tile.rows, tile.depth), descriptors),
        launch.source(problem.weight, (tile.depth, tile.columns), descriptors),
        launch.source(out.flatten(0, 1), (tile.rows, strip), in_l2), problem.count,
        out.shape[0], problem.rows, problem.features, d_logits.stride(0), problem.weight.stride(0),
        STRIP=strip, IN_L2=in_l2, **launch.matmul(configuration, tile, problem.weight.dtype),
    )  # fmt: skip

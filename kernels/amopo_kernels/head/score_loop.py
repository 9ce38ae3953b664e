"""`fused`: the loop over tiles of scores, with one epilogue in the forward and another in the backward.

    z = cap(X W^T + b)            log_sum_exp.py: its statistics;  logit_gradient.py: its gradient

Work: 2 N H FLOP per column. Reads X and W (W once per group of row tiles); logits stay in registers, and what is
written is the epilogue's. Order: a persistent grid walks the tiles, GROUP row tiles together, columns outermost. The
walk and the sum are one loop (`flatten`), so that the next tile's loads are in flight during the epilogue.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from . import launch
from .log_sum_exp import LogSumExp, finish_log_sum_exp, store_exponentials
from .logit_gradient import LogitGradient, logit_gradient, store_gradient
from .problem import Problem
from .tiles import dot, grouped_tile, load_tile, rows_to_compute, strips_of

WARP_SPECIALIZED = os.environ.get("AMOPO_KERNELS_WARP_SPECIALIZED") == "1"  # where warp_specialized.py has a kernel


@triton.jit
def finish_strip(
    products, row, column, begin, scoring, epilogue, ROWS: tl.constexpr, STRIP: tl.constexpr, GRADIENT: tl.constexpr
):
    """The epilogue of one strip: `epilogue` is a LogitGradient if GRADIENT, else a LogSumExp."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, STRIP)
    if GRADIENT:
        gradient = logit_gradient(products, r, c, column, scoring, epilogue, STRIP)
        store_gradient(gradient, r, c - begin, row // ROWS, scoring, epilogue)
    else:
        exponentials = finish_log_sum_exp(products, r, c, column, scoring, epilogue, STRIP)
        if epilogue.exponentials is not None:
            store_exponentials(exponentials, r, c, begin, scoring, epilogue)


@triton.jit
def _score_kernel(
    begin, end, hidden, weight, scoring, epilogue, features, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    GRADIENT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows_to_compute(scoring), ROWS)
    column_tiles = tl.cdiv(end - begin, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = begin + column_tile * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, features, DEPTH):
            x = load_tile(hidden, row, k, scoring.rows, features, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
            w = load_tile(weight, column, k, scoring.vocabulary, features, weight_stride, COLUMNS, DEPTH, DESCRIPTORS)
            accumulator = dot(x, w.T, accumulator, PRECISION)
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in tl.static_range(COLUMNS // STRIP):
            finish_strip(strips[i], row, column + i * STRIP, begin, scoring, epilogue, ROWS, STRIP, GRADIENT)


def strip_columns(device: torch.device, dtype: torch.dtype, narrow: bool) -> int:
    """Columns of a strip: what the epilogue can hold in registers besides the accumulators; `narrow` if it does more
    than log-sum-exp or the gradient of log-probabilities."""
    return min(launch.tiles(device, dtype).scores.columns, 32 if narrow else 64)


def row_blocks(problem: Problem) -> int:
    """How many partial sums of the bias's gradient there are."""
    return launch.blocks(problem.rows, launch.configuration(problem).scores.rows)


def scores(problem: Problem, strip: int, epilogue: LogSumExp | LogitGradient, width: int) -> launch.SliceLaunch:
    """Scores a slice of at most `width` columns and finishes every strip of it. It begins at a multiple of a tile's."""
    if WARP_SPECIALIZED:
        from . import warp_specialized  # in Gluon, which Triton calls experimental

        if warp_specialized.fits(problem, epilogue):
            return warp_specialized.scores(problem, strip, epilogue)
    configuration = launch.configuration(problem)
    tile, descriptors = configuration.scores, configuration.descriptors
    return launch.SliceLaunch(
        _score_kernel,
        lambda columns: launch.grid(tile, problem.hidden.device, problem.rows, columns),
        launch.source(problem.hidden, (tile.rows, tile.depth), descriptors),
        launch.source(problem.weight, (tile.columns, tile.depth), descriptors),
        problem.scoring, epilogue, problem.features, problem.hidden.stride(0), problem.weight.stride(0),
        STRIP=strip, GRADIENT=isinstance(epilogue, LogitGradient),
        **launch.matmul(configuration, tile, problem.hidden.dtype),
    )  # fmt: skip

"""`fused` on sm_90, in Gluon: the tiles of scores with loads, products and epilogues in warps of their own.

Off unless AMOPO_KERNELS_WARP_SPECIALIZED=1, until the suite's entry `warp_specialized` has passed on a GPU. Work,
tiles, order and results are score_loop.py's, whose epilogues finish the strips here too. A program has three parts:

    producer     1 warp     for every tile and step of DEPTH: waits until a stage of the ring is empty, and asks the TMA
                            for 128 rows of X and 256 of W in it
    consumers    4 warps    each for 64 of a tile's rows: waits until a stage is full, multiplies (wgmma 64 x 256 x 16),
                            says that it is done with the stage; at the tile's end its epilogue

Both consumers read the same W of a stage, so that a tile takes 3/256 bytes of operands from L2 per multiply-add, as in
score_loop.py. The second one begins when the first has asked for LEAD products, and stays behind: while one is in its
epilogue, the other has steps in the ring to multiply, alone at twice the speed. As many fewer are loaded ahead.

`full` of a stage counts the bytes that arrived, `empty` the consumers that are done with it. The n-th use of a stage is
phase n of both, and a wait names the parity of the phase that has to be over. Rows, columns and features past the end
are read as 0 by the TMA, and left out by the epilogue. A cluster that multicasts W would save a third of the bytes from
L2: Triton 3.9 can, 3.6 cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import launch
from .log_sum_exp import LogSumExp, finish_log_sum_exp, store_exponentials
from .logit_gradient import LogitGradient, logit_gradient, store_gradient
from .problem import Problem
from .tiles import grouped_tile, narrow, rows_to_compute, strips_of

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # 3.6's name is gone in 3.9
CONSUMERS = gl.constexpr(2)


@gluon.jit
def _produce(
    begin, end, hidden, weight, scoring, features, x_ring, w_ring, full, empty,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(rows_to_compute(scoring), CONSUMERS * ROWS)
    column_tiles = gl.cdiv(end - begin, COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * CONSUMERS * ROWS
        column = begin + column_tile * COLUMNS
        for k in range(0, features, DEPTH):
            stage = step % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)  # of a fresh one, phase -1 is over
            mbarrier.expect(arrived, CONSUMERS * hidden.block_type.nbytes + weight.block_type.nbytes)
            load(weight, [column, k], arrived, w_ring.index(stage))
            for i in gl.static_range(CONSUMERS):
                load(hidden, [row + i * ROWS, k], arrived, x_ring.index(CONSUMERS * stage + i))
            step += 1


@gluon.jit
def _consume(
    begin, end, scoring, epilogue, features, x_ring, w_ring, full, empty, started, NUMBER: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
    GROUP: gl.constexpr, STRIP: gl.constexpr, GRADIENT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row_tiles = gl.cdiv(rows_to_compute(scoring), CONSUMERS * ROWS)
    column_tiles = gl.cdiv(end - begin, COLUMNS)
    steps = gl.cdiv(features, DEPTH)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        if NUMBER > 0:
            mbarrier.wait(started, 0)
        accumulator = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for k in range(0, steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            x = x_ring.index(CONSUMERS * stage + NUMBER)
            w = w_ring.index(stage).permute((1, 0))
            sum_to_be = hopper.warpgroup_mma(x, w, accumulator, use_acc=k > 0, is_async=True)
            accumulator = hopper.warpgroup_mma_wait(1, deps=[sum_to_be])  # the step before is done
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
            if NUMBER == 0:
                if step == gl.minimum(LEAD, steps):
                    mbarrier.arrive(started)
        accumulator = hopper.warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        row = (CONSUMERS * row_tile + NUMBER) * ROWS
        column = begin + column_tile * COLUMNS
        strips = strips_of(accumulator, COLUMNS // STRIP)
        for i in gl.static_range(COLUMNS // STRIP):
            _finish_strip(strips[i], row, column + i * STRIP, begin, scoring, epilogue, ROWS, STRIP, GRADIENT)


@gluon.jit
def _finish_strip(
    products, row, column, begin, scoring, epilogue,
    ROWS: gl.constexpr, STRIP: gl.constexpr, GRADIENT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = products.type.layout
    r = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    c = column + gl.arange(0, STRIP, gl.SliceLayout(0, layout))
    wide: gl.constexpr = _wide_stores(STRIP)
    wide_r = row + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    wide_c = column + gl.arange(0, STRIP, gl.SliceLayout(0, wide))
    if GRADIENT:
        gradient = logit_gradient(products, r, c, column, scoring, epilogue, STRIP)
        gradient = gl.convert_layout(narrow(gradient, epilogue.d_logits.dtype.element_ty), wide)
        store_gradient(gradient, wide_r, wide_c - begin, row // ROWS, scoring, epilogue)
    else:
        exponentials = finish_log_sum_exp(products, r, c, column, scoring, epilogue, STRIP)
        if epilogue.exponentials is not None:
            exponentials = gl.convert_layout(narrow(exponentials, epilogue.exponentials.dtype.element_ty), wide)
            store_exponentials(exponentials, wide_r, wide_c, begin, scoring, epilogue)


@gluon.constexpr_function
def _wide_stores(strip):
    """Of a strip of 64 rows: 16 bytes of 16-bit numbers a thread, 64 of a row together. Each row stays with the four
    threads that have it after wgmma, so that shuffles convert it."""
    more_columns = [[0, 2**i] for i in range(5, strip.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *more_columns, [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, strip],
    )  # fmt: skip


@gluon.jit
def warp_specialized_kernel(
    begin, end, hidden, weight, scoring, epilogue, features,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
    GROUP: gl.constexpr, STRIP: gl.constexpr, GRADIENT: gl.constexpr,
):  # fmt: skip
    x_ring = gl.allocate_shared_memory(hidden.dtype, [CONSUMERS * STAGES, ROWS, DEPTH], hidden.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, DEPTH], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    mbarrier.init(started, count=1)
    # 240 registers a thread for the consumers and 24 for the producer's four warps are all that a processor has.
    gl.warp_specialize(
        [
            (_consume, (begin, end, scoring, epilogue, features, x_ring, w_ring, full, empty, started, 0,
                        ROWS, COLUMNS, DEPTH, STAGES, LEAD, GROUP, STRIP, GRADIENT)),
            (_consume, (begin, end, scoring, epilogue, features, x_ring, w_ring, full, empty, started, 1,
                        ROWS, COLUMNS, DEPTH, STAGES, LEAD, GROUP, STRIP, GRADIENT)),
            (_produce, (begin, end, hidden, weight, scoring, features, x_ring, w_ring, full, empty,
                        ROWS, COLUMNS, DEPTH, STAGES, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class Ring:
    """Of stages in shared memory."""

    depth: int  # of a step
    stages: int
    lead: int  # products that the first consumer asks for before the second begins: 1 to stages


RING = Ring(64, 4, 2)
ROWS = 64  # of a consumer: what its four warps multiply at once
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits(problem: Problem, epilogue: LogSumExp | LogitGradient) -> bool:
    """sm_90, 16-bit operands that the TMA can read, and no gradient of the bias."""
    if launch.configuration(problem) is not launch.SIXTEEN_BIT[90]:
        return False
    return isinstance(epilogue, LogSumExp) or epilogue.d_bias is None


def scores(problem: Problem, strip: int, epilogue: LogSumExp | LogitGradient) -> launch.SliceLaunch:
    """As score_loop.scores, where `fits`."""
    configuration = launch.configuration(problem)
    tile, ring, gradient = configuration.scores, RING, isinstance(epilogue, LogitGradient)
    if gradient and problem.options.softcap is not None:
        strip = min(strip, 32)  # triton 3.6 spills 16 bytes with 64
    return launch.SliceLaunch(
        warp_specialized_kernel,
        lambda columns: launch.grid(tile, problem.hidden.device, problem.rows, columns),
        _source(problem.hidden, [ROWS, ring.depth]), _source(problem.weight, [tile.columns, ring.depth]),
        problem.scoring, epilogue, problem.features,
        ROWS=ROWS, COLUMNS=tile.columns, DEPTH=ring.depth, STAGES=ring.stages, LEAD=ring.lead, GROUP=launch.GROUP,
        STRIP=strip, GRADIENT=gradient, num_warps=4,
    )  # fmt: skip


def _source(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, block, layout)

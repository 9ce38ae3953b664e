"""Segmented sum of gathered rows in one Triton launch, without atomics.

    out[t] = sum of values[order[j]] for j in offsets[t]:offsets[t + 1]           float32 accumulators

One program per (row, block of columns) adds its segment's rows in ascending j and writes once. M rows are read and T
written, all in whole lines; nothing else is stored, so the launch runs at the memory's rate: (M + T) * columns *
itemsize bytes. Most segments of a packed row hold one row and are copies; the longest belong to a prompt and hold one
row per sequence below it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024  # columns of a program; 4 bf16 per thread of 8 warps, two 128-byte lines per warp


@triton.jit(do_not_specialize=["places"])
def segment_sum_kernel(
    values_ptr,  # (places, columns) contiguous
    order_ptr,  # (places,) int32
    offsets_ptr,  # (rows + 1,) int32
    out_ptr,  # (rows, columns) contiguous
    places,
    columns,
    BLOCK: tl.constexpr,  # columns of a program, a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Clamped, and places checked: wrong offsets give wrong sums, never a read out of bounds.
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), places)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(begin, end):
        place = tl.load(order_ptr + j).to(tl.int64)
        limit = tl.where((place >= 0) & (place < places), columns, 0)
        total += tl.load(values_ptr + place * columns + column, mask=column < limit, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)


def segment_sum_rows_triton(
    values: Tensor,  # (M, C) contiguous, float16, bfloat16 or float32
    order: Tensor,  # (M,) int32
    offsets: Tensor,  # (T + 1,) int32
) -> Tensor:  # (T, C) of values' dtype
    places, columns = values.shape
    out = values.new_empty(offsets.shape[0] - 1, columns)
    if out.numel():
        block = min(triton.next_power_of_2(columns), MAX_BLOCK)
        grid = (out.shape[0], triton.cdiv(columns, block))
        with torch.cuda.device_of(values):
            segment_sum_kernel[grid](
                values, order, offsets, out, places, columns, BLOCK=block, num_warps=min(max(block // 128, 1), 8)
            )
    return out

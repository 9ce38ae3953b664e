"""Rows gathered with repetition, and the gradient of that: a segmented sum in float32 without atomics.

    forward    out[i] = x[indices[i]]                                               M rows read, M written
    backward   dx[t]  = sum of d_out[order[j]] for j in offsets[t]:offsets[t + 1]   M rows read, T written

`order` lists the places of `indices` by the row that they hold, in ascending order, so every row's gradient is added
in one fixed order: the same inputs give the same bits. An atomic index_add would add in any order and round to
bfloat16 after each addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation
from .errors import DoubleBackwardError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform; the torch twin runs everywhere
    triton = None


def inverse_index(indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(order (M,) int32, offsets (rows + 1,) int32) of `indices` (M,), as `gather_rows` takes them."""
    order = torch.argsort(indices, stable=True).int()
    counts = torch.bincount(indices, minlength=rows)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def gather_rows(x: Tensor, indices: Tensor, order: Tensor, offsets: Tensor, *, validate: bool | None = None) -> Tensor:
    """x[indices]; the gradient of a repeated row is summed in float32 in a fixed order.

    Args:
        x: (T, ...) floating point.
        indices: (M,) int32 or int64 in [0, T).
        order, offsets: (M,) int32 and (T + 1,) int32 of `inverse_index(indices, T)`.
        validate: check that order and offsets belong to indices; default: on the CPU. Unchecked wrong ones read
            nothing out of bounds.

    Raises:
        ValueError: shapes that do not fit, or order and offsets that are not the inverse of indices.
        TypeError: dtypes.
        DoubleBackwardError: the gradient is differentiated.
    """
    _check(order, offsets, indices.shape[0], x.shape[0])
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64 (M,), got {indices.dtype} {tuple(indices.shape)}")
    if validation.wants_values(validate, indices):
        held = indices.index_select(0, order)
        expected = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), offsets.diff())
        if not torch.equal(held.long(), expected):
            raise ValueError("order and offsets are not the inverse of indices; make them with inverse_index")
    return _GatherRows.apply(x, indices, order, offsets)


def segment_sum_rows(values: Tensor, order: Tensor, offsets: Tensor, *, backend: str = "auto") -> Tensor:
    """out[t] = sum of values[order[j]] for j in offsets[t]:offsets[t + 1], added up in float32 (float64 for float64).

    Args:
        values: (M, ...) floating point. order: (M,) int32. offsets: (T + 1,) int32, ascending from 0 to M.
        backend: "triton" (CUDA), "torch" (anywhere), "auto".

    Returns:
        (T, ...) of values' dtype. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or backend.
    """
    _check(order, offsets, values.shape[0], offsets.shape[0] - 1)
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r}; choose one of auto, triton, torch")
    if backend == "auto":
        backend = "triton" if values.is_cuda and triton is not None and values.dtype != torch.float64 else "torch"
    run = _segment_sum_triton if backend == "triton" else _segment_sum_torch
    return run(values.flatten(1), order, offsets).view(-1, *values.shape[1:])


def _check(order: Tensor, offsets: Tensor, places: int, rows: int) -> None:
    for name, tensor, length in (("order", order, places), ("offsets", offsets, rows + 1)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.shape != (length,):
            raise ValueError(f"{name} must be ({length},), got {tuple(tensor.shape)}")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(order, offsets)
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled() and grad.requires_grad:
            raise DoubleBackwardError("gather_rows has no second derivative; leave create_graph out")
        return segment_sum_rows(grad.contiguous(), *ctx.saved_tensors), None, None, None


def _segment_sum_torch(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    accumulate = torch.promote_types(values.dtype, torch.float32)
    rows = values.index_select(0, order).to(accumulate)
    return torch.segment_reduce(rows, "sum", offsets=offsets.long(), axis=0, initial=0).to(values.dtype)


def _segment_sum_triton(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    places, columns = values.shape
    out = values.new_empty(offsets.shape[0] - 1, columns)
    if out.numel():
        block = min(triton.next_power_of_2(columns), 1024)
        grid = (out.shape[0], triton.cdiv(columns, block))
        warps = max(block // 256, 1)
        segment_sum_kernel[grid](values, order, offsets, out, places, columns, BLOCK=block, num_warps=warps)
    return out


if triton is not None:

    @triton.jit
    def segment_sum_kernel(
        values,  # (places, columns) contiguous
        order,  # (places,) int32
        offsets,  # (rows + 1,) int32
        out,  # (rows, columns) contiguous
        places,
        columns,
        BLOCK: tl.constexpr,  # columns of a program, a power of two
    ):
        """One program per (row, block of columns): reads its segment's rows one after another, writes one."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        begin = tl.maximum(tl.load(offsets + row), 0)
        end = tl.minimum(tl.load(offsets + row + 1), places)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in range(begin, end):
            place = tl.load(order + j).to(tl.int64)
            held = (place >= 0) & (place < places)
            total += tl.load(values + place * columns + column, mask=inside & held, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)

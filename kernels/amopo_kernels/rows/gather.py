"""Rows gathered with repetition, and the gradient of that: a segmented sum in float32 without atomics.

    forward    out[i] = x[indices[i]]                                               M rows read, M written
    backward   dx[t]  = sum of d_out[order[j]] for j in offsets[t]:offsets[t + 1]   M rows read, T written

`order` lists the places of `indices` by the row that they hold, in ascending order, so every row's gradient is added
in one fixed order: the same inputs give the same bits. An atomic index_add would add in any order and round to
bfloat16 after each addition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import dispatch
from ..autograd import Gradient, refuse_forward_mode
from ..errors import UnsupportedError
from ..validation import INTEGERS, check_tensor, wants_values


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
    check_tensor("x", x, ("T", "..."))
    check_tensor("indices", indices, ("M",), device=x.device, dtypes=INTEGERS)
    _check(order, offsets, indices.shape[0], x.shape[0], x.device)
    refuse_forward_mode("gather_rows", x)
    if wants_values(validate, indices):
        held = indices.index_select(0, order)
        expected = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), offsets.diff())
        if not torch.equal(held.long(), expected):
            raise ValueError("order and offsets are not the inverse of indices; make them with inverse_index")
    return _GatherRows.apply(x, indices, order, offsets)


def segment_sum_rows(values: Tensor, order: Tensor, offsets: Tensor, *, backend: str = "auto") -> Tensor:
    """out[t] = sum of values[order[j]] for j in offsets[t]:offsets[t + 1], added up in float32 (float64 for float64).

    Args:
        values: (M, ...) floating point. order: (M,) int32. offsets: (T + 1,) int32, ascending from 0 to M.
        backend: "triton" (CUDA, not float64), "torch" (anywhere), or "auto", the first of them that can.

    Returns:
        (T, ...) of values' dtype. Not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or backend. UnsupportedError: float64 under "triton".
    """
    check_tensor("values", values, ("M", "..."))
    check_tensor("offsets", offsets, ("T + 1",), device=values.device, dtypes=(torch.int32,))
    _check(order, offsets, values.shape[0], offsets.shape[0] - 1, values.device)
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r}; choose one of auto, triton, torch")
    if backend == "auto":
        triton = values.is_cuda and values.dtype != torch.float64 and dispatch.HAS_TRITON
        backend = "triton" if triton else "torch"
    rows = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    if backend == "torch":
        out = _segment_sum_torch(rows, order, offsets)
    else:
        if values.dtype == torch.float64:
            raise UnsupportedError("backend 'triton' adds in float32; use backend='torch' for float64 values")
        from .segment_sum import segment_sum_rows_triton

        out = segment_sum_rows_triton(rows.contiguous(), order.contiguous(), offsets.contiguous())
    return out.view(offsets.shape[0] - 1, *values.shape[1:])


def _check(order: Tensor, offsets: Tensor, places: int, rows: int, device: torch.device) -> None:
    for name, tensor, length in (("order", order, places), ("offsets", offsets, rows + 1)):
        check_tensor(name, tensor, (length,), device=device, dtypes=(torch.int32,))


class _GatherRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, indices: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        return x.index_select(0, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _RowSums.once()(grad, *ctx.saved_tensors), None, None, None


class _RowSums(Gradient):
    of = "gather_rows"
    instead = "x[indices]"

    @staticmethod
    def forward(grad: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        return segment_sum_rows(grad, order, offsets)


def _segment_sum_torch(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    accumulate = torch.promote_types(values.dtype, torch.float32)
    rows = values.index_select(0, order).to(accumulate)
    return torch.segment_reduce(rows, "sum", offsets=offsets.long(), axis=0, initial=0).to(values.dtype)

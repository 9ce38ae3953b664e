"""From log-probabilities of rows to statistics of sequences, and one number per sequence back to its rows.

    logp_sum = sum_t logp_t      prob_mean, prob_std = mean and unbiased deviation of exp(logp_t), in two passes:
    sum p^2 - n mean^2 would be 0 or negative in float32 where every p is near 1.

One program per sequence, in both directions; reads 8 N bytes, no atomics. Offsets are checked on the GPU by every
program: bad ones read nothing out of bounds and make every result NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import Gradient, refuse_forward_mode
from ..numerics import LOG2E


@triton.jit
def _offsets_are_bad(cu_seqlens, sequences, rows, BLOCK: tl.constexpr):
    bad = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + sequences) != rows)
    for first in range(0, sequences, BLOCK):
        i = first + tl.arange(0, BLOCK)
        begin = tl.load(cu_seqlens + i, mask=i < sequences, other=0)
        end = tl.load(cu_seqlens + i + 1, mask=i < sequences, other=0)
        bad = bad | (tl.max((end < begin).to(tl.int32), 0) > 0)
    return bad


@triton.jit(do_not_specialize=["rows", "sequences"])
def _sequences_kernel(
    logps, cu_seqlens, logp_sum, length, prob_mean, prob_std, rows, sequences, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    bad = _offsets_are_bad(cu_seqlens, sequences, rows, BLOCK)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    end = tl.where(bad, begin, end)
    logp_total = tl.zeros((BLOCK,), tl.float32)
    p_total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        r = first + tl.arange(0, BLOCK)
        values = tl.load(logps + r, mask=r < end, other=0.0).to(tl.float32)
        logp_total += values
        p_total += tl.where(r < end, tl.exp2(values * LOG2E), 0.0)
    count = (end - begin).to(tl.float32)
    mean = tl.sum(p_total, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        r = first + tl.arange(0, BLOCK)
        values = tl.load(logps + r, mask=r < end, other=0.0).to(tl.float32)
        deviation = tl.where(r < end, tl.exp2(values * LOG2E) - mean, 0.0)
        squares += deviation * deviation
    deviation = tl.sqrt(tl.sum(squares, 0) / tl.maximum(count - 1, 1.0))
    poison = tl.where(bad, float("nan"), 0.0)
    tl.store(logp_sum + sequence, tl.sum(logp_total, 0) + poison)
    tl.store(prob_mean + sequence, mean + poison)
    tl.store(prob_std + sequence, deviation + poison)
    # Length 1 where the offsets are bad: length 0 would pass for an absent dimension and hide the NaN.
    tl.store(length + sequence, tl.where(bad, 1, end - begin).to(tl.int32))


@triton.jit(do_not_specialize=["rows", "sequences"])
def _rows_kernel(grad_sum, cu_seqlens, grad, rows, sequences, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    bad = _offsets_are_bad(cu_seqlens, sequences, rows, BLOCK)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    # Every row must be written: with bad offsets the programs share the rows evenly and write NaN.
    share = tl.cdiv(rows, sequences)
    begin = tl.where(bad, tl.minimum(sequence * share, rows), begin)
    end = tl.where(bad, tl.minimum((sequence + 1) * share, rows), end)
    value = tl.where(bad, float("nan"), tl.load(grad_sum + sequence))
    for first in range(begin, end, BLOCK):
        r = first + tl.arange(0, BLOCK)
        tl.store(grad + r, tl.zeros((BLOCK,), tl.float32) + value, mask=r < end)


def sequence_sums(logps: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps (N,), cu_seqlens (S + 1,) -> logp_sum, differentiable, length int32, prob_mean, prob_std, each (S,);
    float32."""
    refuse_forward_mode("sequence_stats", logps)
    return _SequenceSums.apply(logps, cu_seqlens)


class _SequenceSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logps, cu_seqlens):
        return sums_of_sequences(logps, cu_seqlens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logps, cu_seqlens = inputs
        ctx.rows, ctx.dtype = logps.shape[0], logps.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_seqlens)

    @staticmethod
    def backward(ctx, grad, *_):
        return None if grad is None else _RowGradient.once()(grad, *ctx.saved_tensors, ctx.rows, ctx.dtype), None


class _RowGradient(Gradient):
    of = "sequence_stats"

    @staticmethod
    def forward(grad, cu_seqlens, rows, dtype):
        return rows_of_sequences(grad, cu_seqlens, rows).to(dtype)


_LIBRARY = torch.library.Library("amopo_kernels", "FRAGMENT")  # as in head/operators.py
_LIBRARY.define("sums_of_sequences(Tensor logps, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define("rows_of_sequences(Tensor grad, Tensor cu_seqlens, int rows) -> Tensor")


@torch.library.impl(_LIBRARY, "sums_of_sequences", "CompositeExplicitAutograd")
def _sums_of_sequences(logps: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = cu_seqlens.shape[0] - 1
    logp_sum, length, mean, std = _empty_sums(logps, cu_seqlens)
    if sequences:
        with torch.cuda.device_of(logps):  # Triton launches on the current device
            _sequences_kernel[(sequences,)](
                logps.contiguous(), cu_seqlens.contiguous(), logp_sum, length, mean, std, logps.shape[0], sequences,
                BLOCK=1024, num_warps=4,
            )  # fmt: skip
    return logp_sum, length, mean, std


@torch.library.register_fake("amopo_kernels::sums_of_sequences", lib=_LIBRARY)
def _empty_sums(logps: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = cu_seqlens.shape[0] - 1
    logp_sum, mean, std = (torch.empty(S, dtype=torch.float32, device=logps.device) for _ in range(3))
    return logp_sum, torch.empty(S, dtype=torch.int32, device=logps.device), mean, std


@torch.library.impl(_LIBRARY, "rows_of_sequences", "CompositeExplicitAutograd")
def _rows_of_sequences(grad: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """One number per sequence (S,) -> (N,) float32: every row gets its sequence's number."""
    out = torch.zeros(rows, dtype=torch.float32, device=grad.device)
    if rows and grad.shape[0]:
        with torch.cuda.device_of(grad):
            _rows_kernel[(grad.shape[0],)](
                grad.contiguous(), cu_seqlens.contiguous(), out, rows, grad.shape[0], BLOCK=1024, num_warps=4
            )
    return out


@torch.library.register_fake("amopo_kernels::rows_of_sequences", lib=_LIBRARY)
def _empty_rows(grad: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=grad.device)


sums_of_sequences = torch.ops.amopo_kernels.sums_of_sequences.default
rows_of_sequences = torch.ops.amopo_kernels.rows_of_sequences.default

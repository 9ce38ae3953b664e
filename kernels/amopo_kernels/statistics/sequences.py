"""sequence_stats and linear_sequence_stats: what a preference loss needs to know of every sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from ..head.logps import label_logps
from ..head.options import choose_options
from ..head.validation import check_linear
from ..head.vocabulary_shard import take_shard
from ..types import SequenceStats
from ..validation import INTEGERS, check_tensor, wants_values


def sequence_stats(logps: Tensor, cu_seqlens: Tensor) -> SequenceStats:
    """Sums, lengths and probability statistics of consecutive segments of log-probabilities.

    Args:
        logps: (N,) floating point. cu_seqlens: (S + 1,) int32, from 0 to N; an empty segment is an absent dimension.

    Returns:
        SequenceStats; `logp_sum` is differentiable, its gradient is one number per sequence. Sums run in float64 on the
        CPU, in float32 by one Triton launch on CUDA.

    Raises:
        ValueError: cu_seqlens (its values are checked on the CPU only).
    """
    check_tensor("logps", logps, ("N",))
    check_cu_seqlens(cu_seqlens, logps, None)
    triton = logps.is_cuda and logps.dtype != torch.float64 and dispatch.HAS_TRITON
    return _triton_sequence_stats(logps, cu_seqlens) if triton else _torch_sequence_stats(logps, cu_seqlens)


def _triton_sequence_stats(logps: Tensor, cu_seqlens: Tensor) -> SequenceStats:
    """One launch; results as those of `_torch_sequence_stats`."""
    from .sequence_sums import sequence_sums

    logp_sum, length, prob_mean, prob_std = sequence_sums(logps, cu_seqlens)
    return SequenceStats(logp_sum, length, prob_mean, prob_std, logps.detach())


def _torch_sequence_stats(logps: Tensor, cu_seqlens: Tensor) -> SequenceStats:
    """sequence_stats of unchecked offsets: bad ones read nothing out of bounds and give NaN everywhere."""
    rows = logps.shape[0]
    offsets = cu_seqlens.long()
    bad = (offsets[0] != 0) | (offsets[-1] != rows) | (offsets[1:] < offsets[:-1]).any()
    poison = torch.where(bad, float("nan"), 1.0)
    # Length 1 where the offsets are bad: length 0 would pass for an absent dimension and hide the NaN.
    length = (offsets[1:] - offsets[:-1]).masked_fill(bad, 1)
    offsets = offsets.masked_fill(bad, 0)
    result = torch.promote_types(logps.dtype, torch.float32)
    if rows == 0 or length.numel() == 0:
        zeros = (logps.new_zeros(length.shape) * poison).to(result)
        return SequenceStats(zeros + 0 * logps.sum().to(result), length.int(), zeros, zeros, logps.detach())

    def segment_sum(values: Tensor) -> Tensor:
        return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0) * poison

    probabilities = logps.detach().double().exp()
    mean = segment_sum(probabilities) / length.clamp(min=1)
    segment = torch.searchsorted(offsets[1:], torch.arange(rows, device=logps.device), right=True)
    # Two passes: sum p^2 - n mean^2 cancels where every p is near 1.
    variance = segment_sum((probabilities - mean[segment.clamp(max=length.numel() - 1)]).square())
    return SequenceStats(
        logp_sum=segment_sum(logps).to(result),
        length=length.int(),
        prob_mean=mean.to(result),
        prob_std=(variance / (length - 1).clamp(min=1)).sqrt().to(result),
        logps=logps.detach(),
    )


def linear_sequence_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    validate: bool | None = None,
    logits_cache_bytes: int = 0,
) -> SequenceStats:
    """`sequence_stats(linear_logps(...))` over label rows only: hidden (N, H), labels (N,) without ignored rows.

    DPO is `.logp_sum`, SimPO and ORPO `.logp_sum / .length`. Arguments as in `linear_logps`, and

        logits_cache_bytes: memory for probabilities that the forward keeps, in the matmuls' dtype; each kept column
            saves a quarter of its work in the backward. `chunked` and `fused`. Unused where the weight needs no
            gradient: then the forward accumulates the gradient of hidden (N * H * 4 bytes) and nothing is recomputed.

    Raises:
        UnsupportedError: an option that the backend does not have; otherwise as `linear_logps` and `sequence_stats`.
    """
    weight, bias, shard = take_shard(weight, bias, process_group)
    check_linear(hidden, weight, labels, bias, temperature, sharded=process_group is not None)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, H), got {tuple(hidden.shape)}")
    check_cu_seqlens(cu_seqlens, labels, validate)
    options = choose_options(
        hidden, weight, bias, softcap=softcap, temperature=temperature, ignore_index=None, outputs=(), backend=backend,
        validate=validate, cache_bytes=logits_cache_bytes, shard=shard,
    )  # fmt: skip
    logps = label_logps(hidden, weight, labels, bias, temperature, options).logps
    if options.backend == "torch":
        return _torch_sequence_stats(logps, cu_seqlens)
    return _triton_sequence_stats(logps, cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor, of_rows: Tensor, validate: bool | None) -> None:
    """Offsets in a tensor (N,); their values where `validate` allows to read them."""
    check_tensor("cu_seqlens", cu_seqlens, ("S + 1",), device=of_rows.device, dtypes=INTEGERS)
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens must be (S + 1,), the offsets of S sequences, got (0,)")
    rows = of_rows.shape[0]
    if wants_values(validate, cu_seqlens):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows:
            raise ValueError(f"cu_seqlens must run from 0 to {rows}, got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}")
        if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            raise ValueError("cu_seqlens must not decrease")

"""sequence_stats and linear_sequence_stats: what a preference loss needs to know of every sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation
from .logps import linear_logps
from .types import SequenceStats


def sequence_stats(logps: Tensor, cu_seqlens: Tensor) -> SequenceStats:
    """Sums, lengths and probability statistics of consecutive segments of log-probabilities.

    Args:
        logps: (N,) floating point. cu_seqlens: (S + 1,) int32, from 0 to N; an empty segment is an absent dimension.

    Returns:
        SequenceStats; `logp_sum` is differentiable, its gradient is one number per sequence. Sums run in float64.

    Raises:
        ValueError: cu_seqlens (its values are checked on the CPU only).
    """
    validation.check_cu_seqlens(cu_seqlens, logps.shape[0], validation.wants_values(None, logps))
    return _sequence_stats(logps, cu_seqlens)


def _sequence_stats(logps: Tensor, cu_seqlens: Tensor) -> SequenceStats:
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
    temperature: float = 1.0,
    backend: str = "auto",
    validate: bool | None = None,
    logits_cache_bytes: int = 0,
    gradient: str = "exact",
    filter_stats: Tensor | None = None,
) -> SequenceStats:
    """`sequence_stats(linear_logps(...))` over label rows only: hidden (N, H), labels (N,) without ignored rows.

    DPO is `.logp_sum`, SimPO and ORPO `.logp_sum / .length`. Arguments as in `linear_logps`; `logits_cache_bytes`,
    `gradient` and `filter_stats` belong to backends that are not built yet and are refused by name.

    Raises:
        UnsupportedError: an option that the backend does not have; otherwise as `linear_logps` and `sequence_stats`.
    """
    validation.check_exact(gradient, logits_cache_bytes, filter_stats)
    validation.check_cu_seqlens(cu_seqlens, labels.numel(), validation.wants_values(validate, labels))
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, H), got {tuple(hidden.shape)}")
    if validation.wants_values(validate, labels):
        validation.check_labels(labels, weight.shape[0], None)
    logps = linear_logps(
        hidden,
        weight,
        labels,
        bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=torch.iinfo(torch.int64).min,
        backend=backend,
        validate=False,
    )
    return _sequence_stats(logps, cu_seqlens)

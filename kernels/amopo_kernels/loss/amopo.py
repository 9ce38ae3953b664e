"""amopo_loss: from sequence statistics to the AMoPO loss (arXiv 2506.07165; formulas in docs/mathematics.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..statistics import linear_sequence_stats
from ..types import AMoPOLoss, SequenceStats

WEIGHTINGS = ("gaussian", "mean", "uniform")
ORDERS = ("alternating", "stacked")


def amopo_loss(
    stats: SequenceStats,
    *,
    order: str,
    num_dimensions: int,
    beta: float,
    gamma: float,
    noise: Tensor | None = None,
    num_pairs: int | Tensor | None = None,
    weighting: str | Tensor = "gaussian",
    compat: str = "paper",
    sft_coef: float = 0.0,
) -> AMoPOLoss:
    """The adaptive multi-objective preference loss of P pairs in K dimensions; no host synchronisation.

    Float32 statistics on CUDA take one Triton launch, in which the gradient is computed too (differentiable once);
    elsewhere it is plain torch. Both give the same bits in every run.

    Args:
        stats: of S = P * K * 2 sequences.
        order: where a sequence's side stands, 0 chosen, 1 rejected. "alternating": index (pair * K + dimension) * 2 +
            side. "stacked": all chosen, then all rejected, index side * P * K + pair * K + dimension, as TRL has them.
            There is no default: taken for the other, either gives another loss in silence.
        noise: (P, K, 2) standard normal, required for weighting "gaussian".
        num_pairs: normaliser, default P; int or 0-d tensor (best on the device of `stats`: another is copied there).
        weighting: "gaussian" (paper), "mean" (no deviation), "uniform", or a tensor (K,) of relative weights.
        compat: "paper": softmax per pair, sum over dimensions, mean over pairs. "upstream" (the reference code):
            softmax over all entries of the call, mean over its entries.
        sft_coef: weight of -l_w, averaged over pairs and dimensions.

    Returns:
        AMoPOLoss: loss () differentiable through `stats.logp_sum`; weights, margins, rewards (P, K), 0 where absent.

    Raises:
        ValueError: sizes, missing noise, unknown weighting or compat. DoubleBackwardError: a gradient of a gradient on
        CUDA.
    """
    K = num_dimensions
    sequences = stats.logp_sum.shape[0]
    if K < 1 or sequences % (2 * K):
        raise ValueError(f"{sequences} sequences are no multiple of 2 * num_dimensions = {2 * K}")
    P = sequences // (2 * K)
    if order not in ORDERS:
        raise ValueError(f"order={order!r}; choose 'alternating' (chosen, rejected, chosen, ...) or 'stacked'")
    if compat not in ("paper", "upstream"):
        raise ValueError(f"compat={compat!r}; choose 'paper' or 'upstream'")
    if isinstance(num_pairs, Tensor) and num_pairs.dim():
        raise ValueError(f"num_pairs must be an int or a 0-d tensor, got {tuple(num_pairs.shape)}")
    _check_weighting(weighting, noise, P, K)
    return _implementation(stats)(
        stats, order=order, num_dimensions=K, beta=beta, gamma=gamma, noise=noise, num_pairs=num_pairs,
        weighting=weighting, compat=compat, sft_coef=sft_coef,
    )  # fmt: skip


def _implementation(stats: SequenceStats) -> Callable[..., AMoPOLoss]:
    """One Triton launch for float32 statistics on a GPU; plain torch on the CPU, in float64 and without Triton."""
    if stats.logp_sum.is_cuda and stats.logp_sum.dtype == torch.float32 and dispatch.HAS_TRITON:
        from .amopo_triton import amopo_loss

        return amopo_loss
    return _torch_loss


def _check_weighting(weighting: str | Tensor, noise: Tensor | None, P: int, K: int) -> None:
    if isinstance(weighting, Tensor):
        if weighting.shape != (K,):
            raise ValueError(f"weighting must be ({K},), one number per dimension, got {tuple(weighting.shape)}")
    elif weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}; choose {', '.join(WEIGHTINGS)}, or give a tensor ({K},)")
    elif weighting == "gaussian" and (noise is None or noise.shape != (P, K, 2)):
        found = "none" if noise is None else tuple(noise.shape)
        raise ValueError(f"weighting 'gaussian' needs noise ({P}, {K}, 2), standard normal; got {found}")


def _torch_loss(
    stats, *, order, num_dimensions, beta, gamma, noise, num_pairs, weighting, compat, sft_coef
) -> AMoPOLoss:
    """amopo_loss of checked arguments in plain torch: any device, any dtype, differentiable twice."""
    K = num_dimensions
    P = stats.logp_sum.shape[0] // (2 * K)

    def by_pair(x: Tensor) -> Tensor:
        return x.view(P, K, 2) if order == "alternating" else x.view(2, P, K).permute(1, 2, 0)

    length = by_pair(stats.length)
    present = (length > 0).all(-1)
    mean_logp = by_pair(stats.logp_sum) / length.clamp(min=1)
    mean_logp = torch.where(present[..., None], mean_logp, 0.0)
    margins = beta * (mean_logp[..., 0] - mean_logp[..., 1]) - gamma

    mean, std = by_pair(stats.prob_mean.detach()), by_pair(stats.prob_std.detach())
    scores = _scores(mean, std, noise, weighting).masked_fill(~present, float("-inf"))
    grouped = scores.view(1, P * K) if compat == "upstream" else scores
    # A group without any present entry would be 0 / 0.
    weights = torch.softmax(grouped, -1).view(P, K).masked_fill(~present, 0.0).detach()

    losses = weights * F.softplus(-margins)
    total = losses.sum()
    if compat == "upstream":
        total = total * P / present.sum().clamp(min=1)
    if sft_coef:
        share = present.sum(-1, keepdim=True).clamp(min=1)
        total = total - sft_coef * (mean_logp[..., 0] / share).sum()
    loss = total / (max(P, 1) if num_pairs is None else num_pairs)
    rewards = beta * mean_logp.detach()
    return AMoPOLoss(
        loss, weights, torch.where(present, margins, 0.0).detach(), rewards[..., 0].clone(), rewards[..., 1].clone()
    )


def _scores(mean: Tensor, std: Tensor, noise: Tensor | None, weighting: str | Tensor) -> Tensor:
    """(P, K): what the softmax over dimensions sees; mean, std (P, K, 2)."""
    if isinstance(weighting, Tensor):
        return weighting.to(mean).log().expand(mean.shape[:2])
    if weighting == "uniform":
        return torch.zeros_like(mean[..., 0])
    if weighting == "mean":
        return mean.sum(-1)
    return (mean + std * noise.to(mean)).sum(-1)


def linear_amopo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    order: str,
    num_dimensions: int,
    beta: float,
    gamma: float,
    noise: Tensor | None = None,
    num_pairs: int | Tensor | None = None,
    weighting: str | Tensor = "gaussian",
    compat: str = "paper",
    sft_coef: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    validate: bool | None = None,
    logits_cache_bytes: int = 0,
) -> AMoPOLoss:
    """`amopo_loss(linear_sequence_stats(...))`; arguments, results and errors as there."""
    stats = linear_sequence_stats(
        hidden, weight, labels, cu_seqlens, bias,
        softcap=softcap, temperature=temperature, backend=backend, validate=validate,
        logits_cache_bytes=logits_cache_bytes,
    )  # fmt: skip
    return amopo_loss(
        stats, order=order, num_dimensions=num_dimensions, beta=beta, gamma=gamma, noise=noise, num_pairs=num_pairs,
        weighting=weighting, compat=compat, sft_coef=sft_coef,
    )  # fmt: skip

"""amopo_loss: from sequence statistics to the AMoPO loss (arXiv 2506.07165; formulas in docs/mathematics.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..statistics import linear_sequence_stats
from ..types import AMoPOLoss, SequenceStats

WEIGHTINGS = ("gaussian", "mean", "uniform", "worst_first")
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
    prior: Tensor | None = None,
    tau: float = 1.0,
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
        weighting: "gaussian" (paper), "mean" (no deviation), "uniform", "worst_first" (exp(-margin / tau): the
            dimension that is behind weighs most, as in group DRO, arXiv 1911.08731), or a tensor (K,): short for
            "uniform" with that prior. Weights are constants of the gradient, whatever they follow.
        prior: (K,) or (P, K), not negative: factors of the weights before they are normalised. An entry of 0 has no
            weight; a pair of zeros has no loss but that of sft_coef. Not checked, since that would synchronise.
        tau: of "worst_first", in units of the margin; large: uniform, small: the worst dimension alone.
        compat: "paper": softmax per pair, sum over dimensions, mean over pairs. "upstream" (the reference code):
            softmax over all entries of the call, mean over its entries.
        sft_coef: weight of -l_w, averaged over pairs and dimensions.

    Returns:
        AMoPOLoss: loss () differentiable through `stats.logp_sum`; weights, margins, rewards (P, K), 0 where absent.

    Raises:
        ValueError: sizes, missing noise, unknown weighting or compat, tau that is not positive. DoubleBackwardError: a
        gradient of a gradient on CUDA.
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
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
    if isinstance(weighting, Tensor):
        _check_prior("weighting", weighting, P, K)
        weighting, prior = "uniform", weighting if prior is None else weighting * prior
    _check_weighting(weighting, noise, P, K)
    if prior is not None:
        _check_prior("prior", prior, P, K)
    return _implementation(stats)(
        stats, order=order, num_dimensions=K, beta=beta, gamma=gamma, noise=noise, num_pairs=num_pairs,
        weighting=weighting, prior=prior, tau=tau, compat=compat, sft_coef=sft_coef,
    )  # fmt: skip


def _implementation(stats: SequenceStats) -> Callable[..., AMoPOLoss]:
    """One Triton launch for float32 statistics on a GPU; plain torch on the CPU, in float64 and without Triton."""
    if stats.logp_sum.is_cuda and stats.logp_sum.dtype == torch.float32 and dispatch.HAS_TRITON:
        from .amopo_triton import amopo_loss

        return amopo_loss
    return _torch_loss


def _check_prior(name: str, prior: Tensor, P: int, K: int) -> None:
    if prior.shape not in ((K,), (P, K)):
        raise ValueError(f"{name} must be ({K},), one number per dimension, or ({P}, {K}), got {tuple(prior.shape)}")


def _check_weighting(weighting: str, noise: Tensor | None, P: int, K: int) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}; choose {', '.join(WEIGHTINGS)}, or give a tensor ({K},)")
    if weighting == "gaussian" and (noise is None or noise.shape != (P, K, 2)):
        found = "none" if noise is None else tuple(noise.shape)
        raise ValueError(f"weighting 'gaussian' needs noise ({P}, {K}, 2), standard normal; got {found}")


def _torch_loss(
    stats, *, order, num_dimensions, beta, gamma, noise, num_pairs, weighting, prior, tau, compat, sft_coef
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

    if weighting == "worst_first":
        scores = -margins.detach() / tau
    else:
        scores = _scores(by_pair(stats.prob_mean.detach()), by_pair(stats.prob_std.detach()), noise, weighting)
    weighed = present
    if prior is not None:
        prior = prior.to(scores)
        scores, weighed = scores + prior.log(), present & (prior != 0)
    scores = scores.masked_fill(~weighed, float("-inf"))
    grouped = scores.view(1, P * K) if compat == "upstream" else scores
    # A group without any entry would be 0 / 0.
    weights = torch.softmax(grouped, -1).view(P, K).masked_fill(~weighed, 0.0).detach()

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


def _scores(mean: Tensor, std: Tensor, noise: Tensor | None, weighting: str) -> Tensor:
    """(P, K): what the softmax over dimensions sees, without the prior; mean, std (P, K, 2)."""
    if weighting == "uniform":
        return torch.zeros_like(mean[..., 0])
    if weighting == "mean":
        return mean.sum(-1)
    return (mean + std * noise.to(mean.dtype)).sum(-1)


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
    prior: Tensor | None = None,
    tau: float = 1.0,
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
        weighting=weighting, prior=prior, tau=tau, compat=compat, sft_coef=sft_coef,
    )  # fmt: skip

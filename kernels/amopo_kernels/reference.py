"""The oracle: every public function in plain torch that materialises all logits, with the same signatures.

Slow and hungry on purpose; autograd differentiates it. Run it in float64 to judge the backends. It takes no options
that only say how to compute (backend, validate, logits_cache_bytes), and reads offsets on the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import AMoPOLoss, SequenceStats


def linear_logps(hidden, weight, labels, bias=None, *, softcap=None, temperature=1.0, ignore_index=-100,
                 return_entropy=False, outputs=()):  # fmt: skip
    """log softmax(head(hidden))[label], and what `outputs` names; see amopo_kernels.linear_logps."""
    ignored = labels == ignore_index
    hidden = hidden.masked_fill(ignored[..., None], 0.0)  # whatever an ignored row holds touches nothing
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    scores = logits / temperature
    all_logps = torch.log_softmax(scores, dim=-1)
    probabilities = all_logps.exp()
    found = {
        "logps": all_logps.gather(-1, labels.masked_fill(ignored, 0).long()[..., None]).squeeze(-1),
        # masked_fill: a token of probability 0 adds nothing, though its log is infinite
        "entropy": -(probabilities * all_logps.masked_fill(probabilities == 0, 0.0)).sum(-1),
        "lse": scores.logsumexp(-1),
        "mean_logit": scores.mean(-1),
        "top1": scores.argmax(-1),
        "log_sum_p2": (2 * all_logps.detach()).logsumexp(-1),
    }
    names = ("logps", "entropy") if return_entropy else ("logps", *outputs)
    wanted = [found[name].masked_fill(ignored, 0) for name in names]
    return tuple(wanted) if len(wanted) > 1 else wanted[0]


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
                         ignore_index=-100, label_smoothing=0.0, z_loss=0.0, shift=False, softcap=None,
                         temperature=1.0):  # fmt: skip
    """See amopo_kernels.linear_cross_entropy; the loss alone, by torch's own."""
    if shift:
        input, target = input[..., :-1, :], target[..., 1:]
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scores = (logits / temperature).flatten(0, -2)
    labels = target.flatten()
    loss = F.cross_entropy(scores, labels.long(), weight, ignore_index=ignore_index, reduction=reduction,
                           label_smoothing=label_smoothing)  # fmt: skip
    squares = z_loss * scores.logsumexp(-1).square().masked_fill(labels == ignore_index, 0)
    if reduction == "none":
        return (loss + squares).view(target.shape)
    return loss + (squares.sum() if reduction == "sum" else squares.sum() / (labels != ignore_index).sum())


def sequence_stats(logps, cu_seqlens) -> SequenceStats:
    """See amopo_kernels.sequence_stats."""
    segments = torch.tensor_split(logps, cu_seqlens[1:-1].cpu().long()) if len(cu_seqlens) > 1 else ()
    zero = logps.new_zeros(())
    probs = [segment.detach().exp() for segment in segments]
    return SequenceStats(
        logp_sum=_stack([segment.sum() for segment in segments], zero),
        length=(cu_seqlens[1:] - cu_seqlens[:-1]).int(),
        prob_mean=_stack([p.mean() if len(p) else zero for p in probs], zero),
        prob_std=_stack([p.std() if len(p) > 1 else zero for p in probs], zero),
        logps=logps.detach(),
    )


def linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias=None, *, softcap=None, temperature=1.0):
    """See amopo_kernels.linear_sequence_stats."""
    logps = linear_logps(hidden, weight, labels, bias, softcap=softcap, temperature=temperature)
    return sequence_stats(logps, cu_seqlens)


def amopo_loss(stats, *, order, num_dimensions, beta, gamma, noise=None, num_pairs=None, weighting="gaussian",
               prior=None, tau=1.0, compat="paper", sft_coef=0.0) -> AMoPOLoss:  # fmt: skip
    """See amopo_kernels.amopo_loss; one pair and one dimension at a time."""
    K = num_dimensions
    P = len(stats.length) // (2 * K)
    zero = stats.logp_sum.new_zeros(())
    rewards = {}  # (pair, dimension, side) -> l
    scores = {}  # (pair, dimension) -> what the softmax sees
    for p in range(P):
        for k in range(K):
            entry = p * K + k
            index = [entry * 2 + side if order == "alternating" else side * P * K + entry for side in (0, 1)]
            if any(stats.length[i] == 0 for i in index):
                continue
            for side, i in enumerate(index):
                rewards[p, k, side] = stats.logp_sum[i] / stats.length[i]
            if isinstance(weighting, Tensor):
                scores[p, k] = weighting[k].log().to(zero.dtype)
            elif weighting == "uniform":
                scores[p, k] = zero
            elif weighting == "worst_first":
                scores[p, k] = -(beta * (rewards[p, k, 0] - rewards[p, k, 1]) - gamma) / tau
            else:
                eps = noise[p, k] if weighting == "gaussian" else (0.0, 0.0)
                scores[p, k] = sum(stats.prob_mean[i] + stats.prob_std[i] * e for i, e in zip(index, eps, strict=True))
    weights = torch.zeros(P, K, dtype=zero.dtype, device=zero.device)
    groups = [list(scores)] if compat == "upstream" else [[pk for pk in scores if pk[0] == p] for p in range(P)]
    for group in groups:
        if group:
            softmax = torch.softmax(torch.stack([scores[pk] for pk in group]), 0).detach()
            priors = [1.0 if prior is None else prior.expand(P, K)[pk] for pk in group]
            shares = [a * b for a, b in zip(softmax, priors, strict=True)]
            normaliser = sum(shares)
            for pk, share in zip(group, shares, strict=True):
                weights[pk] = share / normaliser if normaliser else 0.0
    table = {name: torch.zeros_like(weights) for name in ("margins", "chosen", "rejected")}
    total, sft = zero, zero
    present = [sum((p, k) in scores for k in range(K)) for p in range(P)]
    for p, k in scores:
        chosen, rejected = rewards[p, k, 0], rewards[p, k, 1]
        margin = beta * (chosen - rejected) - gamma
        total = total + weights[p, k] * F.softplus(-margin)
        sft = sft - chosen / present[p]
        table["margins"][p, k] = margin.detach()
        table["chosen"][p, k] = beta * chosen.detach()
        table["rejected"][p, k] = beta * rejected.detach()
    if compat == "upstream" and scores:
        total = total * P / len(scores)
    num_pairs = P if num_pairs is None else num_pairs
    loss = (total + sft_coef * sft) / num_pairs if P else stats.logp_sum.sum()
    return AMoPOLoss(loss, weights, table["margins"], table["chosen"], table["rejected"])


def linear_amopo_loss(hidden, weight, labels, cu_seqlens, bias=None, *, softcap=None, temperature=1.0, **loss_options):
    """See amopo_kernels.linear_amopo_loss."""
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, softcap=softcap, temperature=temperature)
    return amopo_loss(stats, **loss_options)


def _stack(values: list[Tensor], zero: Tensor) -> Tensor:
    return torch.stack(values) if values else zero.new_zeros(0)

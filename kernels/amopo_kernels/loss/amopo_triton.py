"""The AMoPO loss of a batch in one Triton launch, its gradient included.

    m = beta * (l_w - l_l) - gamma        a = softmax(z_w + z_l)        loss = sum a * softplus(-m) / num_pairs
    d loss / d logp_sum_w = -a * beta * sigmoid(-m) / |y_w| / num_pairs,  the opposite sign for l

The gradient needs nothing that the forward has not in registers, so it is stored at once; the backward multiplies it by
the upstream number. One program walks over the pairs in tiles of (BLOCK_P, BLOCK_K): a sum in a fixed order, hence the
same bits in every run, without a second launch or an atomic. It reads 40 bytes and writes 24 per pair and dimension,
so one multiprocessor is enough: a batch of thousands of pairs is still under a megabyte, next to the head's
gigabytes. compat "upstream", whose softmax spans the call, walks over the pairs twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import UnsupportedError, refuse_double_backward
from ..numerics import log1p
from ..types import AMoPOLoss, SequenceStats

TILE = 512  # entries (pair, dimension) per step: 4 per thread of 4 warps. A pair's dimensions must fit into one.
MAX_REGISTERS = 192  # a thread; one program runs, and triton 3.6 would rather spill than take more than 64
_LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: exp(-inf - _LOWEST) is 0, not NaN


@triton.jit
def _place(entry, side, entries, STACKED: tl.constexpr):
    """Where a side of an entry (pair, dimension) stands among the statistics."""
    if STACKED:
        place = entry + side * entries
    else:
        place = 2 * entry + side
    return place


@triton.jit
def _scores(
    logp_sum_ptr, mean_ptr, std_ptr, noise_ptr, prior_ptr, entry, k, entries, present, length_w, length_l, beta, gamma,
    tau, WEIGHTING: tl.constexpr, PRIOR_ROWS: tl.constexpr, STACKED: tl.constexpr,
):  # fmt: skip
    """What the softmax sees: (BLOCK_P, BLOCK_K), -inf where absent or of prior 0."""
    chosen, rejected = _place(entry, 0, entries, STACKED), _place(entry, 1, entries, STACKED)
    if WEIGHTING == "uniform":
        score = tl.zeros_like(entry).to(tl.float32)
    elif WEIGHTING == "worst_first":
        mean_w = tl.load(logp_sum_ptr + chosen, mask=present, other=0.0) / length_w
        mean_l = tl.load(logp_sum_ptr + rejected, mask=present, other=0.0) / length_l
        score = (gamma - beta * (mean_w - mean_l)) / tau
    else:
        score = tl.load(mean_ptr + chosen, mask=present, other=0.0)
        score += tl.load(mean_ptr + rejected, mask=present, other=0.0)
        if WEIGHTING == "gaussian":
            for side in tl.static_range(2):
                std = tl.load(std_ptr + _place(entry, side, entries, STACKED), mask=present, other=0.0)
                eps = tl.load(noise_ptr + 2 * entry + side, mask=present, other=0.0)
                score += std * eps.to(tl.float32)
    if prior_ptr is not None:
        if PRIOR_ROWS:
            place = entry
        else:
            place = tl.zeros_like(entry) + k[None, :]
        score += tl.log(tl.load(prior_ptr + place, mask=present, other=1.0).to(tl.float32))
    return tl.where(present, score, float("-inf"))


@triton.jit
def _present(length_ptr, entry, entries, valid, STACKED: tl.constexpr):
    length_w = tl.load(length_ptr + _place(entry, 0, entries, STACKED), mask=valid, other=0)
    length_l = tl.load(length_ptr + _place(entry, 1, entries, STACKED), mask=valid, other=0)
    return (length_w > 0) & (length_l > 0), tl.maximum(length_w, 1), tl.maximum(length_l, 1)


@triton.jit(do_not_specialize=["pairs"])
def amopo_loss_kernel(
    logp_sum_ptr,  # (P, K, 2) or, STACKED, (2, P, K) float32, as all that follow unless said otherwise
    length_ptr,  # likewise, int32
    mean_ptr,  # likewise
    std_ptr,  # likewise
    noise_ptr,  # (P, K, 2) any float, or None
    prior_ptr,  # (K,) or, PRIOR_ROWS, (P, K), any float, or None
    normaliser_ptr,  # () any number
    loss_ptr,  # ()
    weights_ptr,  # (P, K)
    margins_ptr,  # (P, K)
    chosen_ptr,  # (P, K)
    rejected_ptr,  # (P, K)
    gradient_ptr,  # as logp_sum: d loss / d logp_sum
    pairs,
    beta,
    gamma,
    tau,
    sft_coef,
    divisor,  # where normaliser_ptr is None
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTING: tl.constexpr,  # "gaussian", "mean", "uniform", "worst_first"
    PRIOR_ROWS: tl.constexpr,
    UPSTREAM: tl.constexpr,
    STACKED: tl.constexpr,  # the statistics' order: (2, P, K), not (P, K, 2)
):
    k = tl.arange(0, BLOCK_K)
    valid_k = k < K
    entries = pairs * K
    if normaliser_ptr is not None:
        divisor = tl.load(normaliser_ptr).to(tl.float32)
    inverse = 1.0 / divisor

    top = _LOWEST
    mass = 0.0
    scale = 1.0
    if UPSTREAM:
        count = 0
        for start in range(0, pairs, BLOCK_P):
            pair = start + tl.arange(0, BLOCK_P)
            entry = pair[:, None] * K + k[None, :]
            valid = (pair[:, None] < pairs) & valid_k[None, :]
            present, length_w, length_l = _present(length_ptr, entry, entries, valid, STACKED)
            score = _scores(
                logp_sum_ptr, mean_ptr, std_ptr, noise_ptr, prior_ptr, entry, k, entries, present, length_w, length_l,
                beta, gamma, tau, WEIGHTING, PRIOR_ROWS, STACKED,
            )  # fmt: skip
            raised = tl.maximum(top, tl.max(score))
            mass = mass * tl.exp(top - raised) + tl.sum(tl.exp(score - raised))
            top = raised
            count += tl.sum(present.to(tl.int32))
        scale = pairs.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)

    losses = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for start in range(0, pairs, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        entry = pair[:, None] * K + k[None, :]
        valid = (pair[:, None] < pairs) & valid_k[None, :]
        present, length_w, length_l = _present(length_ptr, entry, entries, valid, STACKED)
        score = _scores(
            logp_sum_ptr, mean_ptr, std_ptr, noise_ptr, prior_ptr, entry, k, entries, present, length_w, length_l,
            beta, gamma, tau, WEIGHTING, PRIOR_ROWS, STACKED,
        )  # fmt: skip
        # The largest entry adds 1 to a sum, which is less only where there is no entry: then nothing has a weight.
        if UPSTREAM:
            weight = tl.exp(score - top) / tl.maximum(mass, 1.0)
        else:
            weight = tl.exp(score - tl.maximum(tl.max(score, axis=1, keep_dims=True), _LOWEST))
            weight = weight / tl.maximum(tl.sum(weight, axis=1, keep_dims=True), 1.0)
        weight = tl.where(present, weight, 0.0)
        chosen, rejected = _place(entry, 0, entries, STACKED), _place(entry, 1, entries, STACKED)
        mean_w = tl.load(logp_sum_ptr + chosen, mask=present, other=0.0) / length_w
        mean_l = tl.load(logp_sum_ptr + rejected, mask=present, other=0.0) / length_l
        margin = beta * (mean_w - mean_l) - gamma
        e = tl.exp(-tl.abs(margin))
        softplus = tl.maximum(-margin, 0.0) + log1p(e)
        share = tl.maximum(tl.sum(present.to(tl.int32), axis=1, keep_dims=True), 1).to(tl.float32)
        sft = tl.where(present, sft_coef / share, 0.0)
        losses += tl.where(present, scale * weight * softplus, 0.0) - sft * mean_w

        slope = scale * weight * beta * tl.where(margin > 0, e, 1.0) / (1.0 + e)  # a * beta * sigmoid(-m)
        gradient_w = tl.where(present, (-slope - sft) / length_w * inverse, 0.0)
        gradient_l = tl.where(present, slope / length_l * inverse, 0.0)
        tl.store(gradient_ptr + chosen, gradient_w, mask=valid)
        tl.store(gradient_ptr + rejected, gradient_l, mask=valid)
        tl.store(weights_ptr + entry, weight, mask=valid)
        tl.store(margins_ptr + entry, tl.where(present, margin, 0.0), mask=valid)
        tl.store(chosen_ptr + entry, beta * mean_w, mask=valid)
        tl.store(rejected_ptr + entry, beta * mean_l, mask=valid)
    tl.store(loss_ptr, tl.sum(losses) * inverse)


@torch.library.custom_op("amopo_kernels::amopo_loss", mutates_args=())
def _loss_and_gradient(
    logp_sum: Tensor,
    length: Tensor,
    prob_mean: Tensor,
    prob_std: Tensor,
    noise: Tensor | None,
    prior: Tensor | None,  # (K,) or (P, K)
    normaliser: Tensor | None,
    divisor: float,  # where normaliser is None
    num_dimensions: int,
    beta: float,
    gamma: float,
    tau: float,
    weighting: str,
    upstream: bool,
    stacked: bool,
    sft_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, weights, margins, chosen_rewards, rejected_rewards, d loss / d logp_sum)."""
    K = num_dimensions
    P = logp_sum.shape[0] // (2 * K)
    loss, tables, gradient = _outputs(logp_sum, P, K)
    block_k = triton.next_power_of_2(K)
    with torch.cuda.device_of(logp_sum):  # Triton launches on the current device
        amopo_loss_kernel[(1,)](
            logp_sum.contiguous(), length.contiguous(), prob_mean.contiguous(), prob_std.contiguous(),
            None if noise is None else noise.contiguous(), None if prior is None else prior.contiguous(),
            normaliser, loss, *tables, gradient, P, beta, gamma, tau, sft_coef, divisor,
            K=K, BLOCK_P=TILE // block_k, BLOCK_K=block_k, WEIGHTING=weighting,
            PRIOR_ROWS=prior is not None and prior.dim() == 2, UPSTREAM=upstream, STACKED=stacked, num_warps=4,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return loss, *tables, gradient


def _outputs(logp_sum: Tensor, P: int, K: int) -> tuple[Tensor, list[Tensor], Tensor]:
    new = logp_sum.new_empty
    return new(()), [new(P, K) for _ in range(4)], new(P * K * 2)


@_loss_and_gradient.register_fake
def _(logp_sum, length, prob_mean, prob_std, noise, prior, normaliser, divisor, num_dimensions, *_):
    loss, tables, gradient = _outputs(logp_sum, logp_sum.shape[0] // (2 * num_dimensions), num_dimensions)
    return loss, *tables, gradient


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the five others would be five launches
    ctx.save_for_backward(output[-1])
    ctx.inputs = len(inputs)


def _backward(ctx, grad_loss, *_):
    refuse_double_backward("amopo_loss on CUDA", "amopo_kernels.reference.amopo_loss")
    (gradient,) = ctx.saved_tensors
    return (None if grad_loss is None else grad_loss * gradient, *[None] * (ctx.inputs - 1))


_loss_and_gradient.register_autograd(_backward, setup_context=_setup_context)


def amopo_loss(
    stats: SequenceStats,
    *,
    order: str,
    num_dimensions: int,
    beta: float,
    gamma: float,
    noise: Tensor | None,
    num_pairs: int | Tensor | None,
    weighting: str,
    prior: Tensor | None,
    tau: float,
    compat: str,
    sft_coef: float,
) -> AMoPOLoss:
    """amopo_kernels.amopo_loss of checked arguments; float32 statistics on CUDA, or in Triton's interpreter."""
    if num_dimensions > TILE:
        raise UnsupportedError(f"the Triton loss takes {TILE} dimensions at most, got {num_dimensions}")
    device = stats.logp_sum.device
    normaliser = None
    noise_read = noise.to(device) if weighting == "gaussian" else None
    prior = prior.to(device) if prior is not None else None
    divisor = 1.0
    if isinstance(num_pairs, Tensor):
        normaliser = num_pairs.to(device)
    else:
        divisor = float(max(stats.logp_sum.shape[0] // (2 * num_dimensions), 1) if num_pairs is None else num_pairs)
    *result, _ = _loss_and_gradient(
        stats.logp_sum, stats.length, stats.prob_mean, stats.prob_std, noise_read, prior, normaliser, divisor,
        num_dimensions, beta, gamma, tau, weighting, compat == "upstream", order == "stacked", sft_coef,
    )  # fmt: skip
    return AMoPOLoss(*result)

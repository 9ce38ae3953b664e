"""logp and entropy of labels under softmax(head(hidden)), in plain torch, one vocabulary slice at a time.

    z = cap(X W^T + b) / temperature        cap(x) = softcap * tanh(x / softcap), or x
    logp = z_y - lse(z) = -softplus(log sum_{v != y} e^z_v - z_y)          1 - p_y = -expm1(logp)

Forward: per slice of columns the logits, an online (maximum, sum) that leaves the label out, the label's logit.
Backward, vocabulary outermost: recompute the slice's logits, turn them into dz in place, write dW[slice] once and add
dz W[slice] to dX. One slice of logits (N x 2048, float32) is alive at a time. 8 N V H FLOP in all, no atomics.
The label-excluded sum keeps 1 - p_y exact near p_y = 1, where p_y itself rounds to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import refuse_double_backward
from .options import Options

SLICE_COLUMNS = 2048
_EXCLUDED = -1e30  # a logit that adds nothing; finite, so that 0 * _EXCLUDED is 0 in the entropy
_MAXIMUM_START = -1e29


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _matmul_dtype(x: Tensor, options: Options) -> torch.dtype:
    """CPU matmuls have no float32 output for 16-bit inputs: the rounded inputs are multiplied in float32."""
    return options.dtype if x.is_cuda else _accumulator(options.dtype)


def _operand(x: Tensor, options: Options) -> Tensor:
    return x.to(options.dtype).to(_matmul_dtype(x, options))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; without a temporary where the dtypes allow it (one pass over out less)."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += _mm(a, b)
    else:
        out.copy_(_mm(a, b))


def _slices(vocabulary: int):
    return ((begin, min(begin + SLICE_COLUMNS, vocabulary)) for begin in range(0, vocabulary, SLICE_COLUMNS))


def _logits(x: Tensor, w: Tensor, bias: Tensor | None, begin: int, end: int, options: Options) -> Tensor:
    z = _mm(x, w.T)
    if bias is not None:
        z += bias[begin:end].to(z.dtype)
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    if options.temperature != 1.0:
        z.div_(options.temperature)
    return z


def _label_column(labels: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(rows whose label lies in the slice (N, 1) bool, its column (N, 1), clamped into the slice)."""
    inside = ((labels >= begin) & (labels < end))[:, None]
    return inside, (labels - begin).clamp(0, end - begin - 1)[:, None]


class LinearLogps(torch.autograd.Function):
    """hidden (N, H), weight (V, H), bias (V,) or None, labels (N,) int64, -1 where ignored -> (logps, entropy) (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignored, options: Options):
        x = _operand(hidden, options)
        total_dtype = _accumulator(options.dtype)
        rows = hidden.shape[0]
        maximum = torch.full((rows, 1), _MAXIMUM_START, dtype=total_dtype, device=hidden.device)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
        label_logit = torch.full_like(maximum, float("nan"))  # a label outside the vocabulary stays NaN
        for begin, end in _slices(weight.shape[0]):
            z = _logits(x, _operand(weight[begin:end], options), bias, begin, end, options)
            inside, column = _label_column(labels, begin, end)
            at_label = z.gather(1, column)
            label_logit = torch.where(inside, at_label, label_logit)
            z.scatter_(1, column, torch.where(inside, torch.full_like(at_label, _EXCLUDED), at_label))
            raised = torch.maximum(maximum, z.amax(1, keepdim=True))
            scale = torch.exp(maximum - raised)
            z.sub_(raised)
            if options.entropy:
                exponentials = torch.exp(z)
                moved = weighted + (maximum - raised) * total
                weighted = moved * scale + z.mul_(exponentials).sum(1, keepdim=True)
            else:
                exponentials = z.exp_()
            total = total * scale + exponentials.sum(1, keepdim=True)
            maximum = raised
        others = maximum + total.log()
        logps = -torch.nn.functional.softplus(others - label_logit, threshold=1e9)
        # softplus overflows in its exponential for a large argument; there it is its argument
        logps = torch.where(others - label_logit > 50, label_logit - others, logps)
        lse = torch.logaddexp(others, label_logit)
        entropy = None
        if options.entropy:
            # -sum p log p with logits relative to the maximum: lse - sum p z would cancel for large logits.
            entropy = torch.exp(maximum - lse) * (total * (lse - maximum) - weighted) - logps.exp() * logps
            entropy = entropy.squeeze(1).masked_fill(ignored, 0.0)
        logps = logps.squeeze(1).masked_fill(ignored, 0.0)
        lse = lse.squeeze(1).masked_fill(ignored, -_EXCLUDED)  # makes every p of the row 0
        ctx.save_for_backward(hidden, weight, bias, labels, lse, logps, entropy)
        ctx.options = options
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        refuse_double_backward("linear_logps", "amopo_kernels.reference.linear_logps")
        # Called inside an autocast region, backward would meet matmuls that round their operands anew.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return LinearLogps._gradients(ctx, grad_logps, grad_entropy)

    @staticmethod
    def _gradients(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, labels, lse, logps, entropy = ctx.saved_tensors
        options = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        x = _operand(hidden, options)
        grad_logps = torch.zeros_like(logps) if grad_logps is None else grad_logps
        with_entropy = options.entropy and grad_entropy is not None
        # 32- and 64-bit: g stays off the N x V slice and goes on the rows of X and dX. In bf16, rounding g X once more
        # would cost accuracy, so dz is scaled instead.
        factored = not with_entropy and not need_bias and x.dtype in (torch.float32, torch.float64)
        slope = (grad_logps / options.temperature)[:, None]
        row_scale = -slope if factored else None  # what is left of dz is p, and p_y - 1 at the label
        x_scaled = x * row_scale if factored else x

        d_hidden = torch.zeros_like(x, dtype=lse.dtype) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        lse, logps = lse[:, None], logps[:, None]
        for begin, end in _slices(weight.shape[0]):
            w = _operand(weight[begin:end], options)
            z = _logits(x, w, bias, begin, end, options)
            inside, column = _label_column(labels, begin, end)
            at_label = torch.expm1(logps)
            cap_slope = None
            if options.softcap is not None:
                cap_slope = 1 - (z * (options.temperature / options.softcap)).square_()
            if with_entropy:
                e_slope = (grad_entropy / options.temperature)[:, None]
                log_p = z.sub_(lse)
                dz = log_p.exp()
                dz.mul_(log_p.add_(entropy[:, None]).mul_(e_slope).add_(slope)).neg_()
                at_label = -slope * at_label - e_slope * logps.exp() * (logps + entropy[:, None])
            else:
                dz = z.sub_(lse).exp_()
                if not factored:
                    dz.mul_(-slope)
                    at_label = -slope * at_label
            dz.scatter_(1, column, torch.where(inside, at_label, dz.gather(1, column)))
            if cap_slope is not None:
                dz.mul_(cap_slope)
            if need_bias:
                d_bias[begin:end] = dz.sum(0)
            dz = dz.to(x.dtype)
            if need_weight:
                _mm_into(d_weight[begin:end], dz.T, x_scaled)
            if need_hidden:
                _mm_into(d_hidden, dz, w, add=True)
        if need_hidden:
            d_hidden = (d_hidden * row_scale if factored else d_hidden).to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


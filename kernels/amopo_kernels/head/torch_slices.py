"""Backend `torch`: the head in plain torch, one slice of the vocabulary at a time.

    logp = s_y - lse = -log(1 + e^d)      1 - p_y = 1 / (1 + e^-d)      d = log sum_{v != y} e^s_v - s_y

with scores s = cap(X W^T + b) / temperature. Forward: per slice of columns the logits, their largest and the sum of
exponentials relative to it, without the label, and the label's logit; a few operations on (slices, N) tables end it.
Backward, vocabulary outermost: recompute the slice's logits, turn them into dS in place, write dW[slice] once and add
dS W[slice] to dX. One slice of logits (N x 1024, float32; x 8192 on a GPU) is alive at a time. 8 N V H FLOP in all, no
atomics; 6 where the forward may keep its exponentials in the memory of dW (`kept_scores`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .kept_scores import KeptScores
from .problem import LOWEST, Forward, Gradients, Problem, RowStatistics, Tables, Upstream
from .vocabulary_shard import gather_strips

SLICE_COLUMNS = 1536  # on a CPU; what 1024 or 2048 take differs by less than two measurements of one
# Fewer slices, fewer launches: with 1024 the host took 38 ms to launch an H100's 149 slices of a forward pass.
SLICE_COLUMNS_ON_A_GPU = 8192


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the matmuls' dtype. CPU matmuls have no float32 output for 16-bit inputs: they multiply in float32."""
    x = x.to(dtype)
    return x if x.is_cuda else x.to(_accumulator(dtype))


def _is_for_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies x, in float32 as MKL does, which torch.mm is: an AMD EPYC takes 7 to 12 % less time,
    but more where x is transposed."""
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and x.stride(1) == 1 and x.numel() > 0 and torch.backends.mkldnn.is_available()


def _native_bfloat16(problem: Problem, d_weight: Tensor) -> bool:
    """Whether dW can be had from a CPU's own bfloat16 products, which accumulate in float32 and round once to dW's
    dtype; logits and dX are needed in float32, for which no CPU product takes bfloat16."""
    dtypes = {problem.options.dtype, d_weight.dtype, problem.hidden.dtype}
    return dtypes == {torch.bfloat16} and not d_weight.is_cuda and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    if _is_for_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return torch.mm(a, b)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; without a temporary where the dtypes allow it and the product is no faster so."""
    if a.dtype == out.dtype and not _is_for_onednn(a):
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += _mm(a, b)
    else:
        out.copy_(_mm(a, b))


def slice_columns(device: torch.device) -> int:
    """Columns of logits that are alive at a time."""
    return SLICE_COLUMNS_ON_A_GPU if device.type == "cuda" else SLICE_COLUMNS


def _slices(problem: Problem) -> Iterator[tuple[int, int]]:
    step = slice_columns(problem.hidden.device)
    return ((begin, min(begin + step, problem.vocabulary)) for begin in range(0, problem.vocabulary, step))


def _logits(problem: Problem, x: Tensor, begin: int, end: int, *, by_token: bool = False) -> Tensor:
    """(N, end - begin); by_token: of which the first dimension is contiguous, as it is where scores are kept."""
    w = _operand(problem.weight[begin:end], problem.options.dtype)
    z = _mm(w, x.T).T if by_token else _mm(x, w.T)
    if problem.bias is not None:
        z += problem.bias[begin:end].to(z.dtype)
    if problem.options.softcap is not None:
        z.div_(problem.options.softcap).tanh_().mul_(problem.options.softcap)
    return z


def _label_column(labels: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(rows whose label lies in the slice (N, 1) bool, its column (N, 1), clamped into the slice)."""
    inside = ((labels >= begin) & (labels < end))[:, None]
    return inside, (labels - begin).clamp(0, end - begin - 1)[:, None]


def _replace_(z: Tensor, inside: Tensor, column: Tensor, value: Tensor | float) -> None:
    """Put `value` at the rows' labels that lie in the slice."""
    z.scatter_(1, column, torch.where(inside, value, z.gather(1, column)))


def _exponentials_(scores: Tensor) -> Tensor:
    """In place, of scores of at most 0. What is no normal number is 0: exp takes 13 times longer where it makes one."""
    lowest = -708.0 if scores.dtype == torch.float64 else -87.3
    return torch.nn.functional.threshold_(scores, lowest, float("-inf")).exp_()


def _cap_slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """cap' of logits, from what they are capped to."""
    return None if softcap is None else 1 - (capped / softcap).square_()


def _scale_(z: Tensor, inverse_temperature: float | Tensor) -> Tensor:
    if isinstance(inverse_temperature, Tensor):
        return z.mul_(inverse_temperature[:, None])
    return z if inverse_temperature == 1 else z.mul_(inverse_temperature)


def forward(problem: Problem) -> Forward:
    """Statistics of every row, and of a frozen head dX per unit of gradient."""
    options = problem.options
    x = _operand(problem.hidden, options.dtype)
    result = _accumulator(options.dtype)
    slices = list(_slices(problem))
    tables = Tables.empty(problem, len(slices), result)
    label_logit = torch.full((problem.rows,), float("nan"), dtype=result, device=x.device)  # outside the vocabulary
    maximum = torch.full_like(label_logit, LOWEST)[:, None]
    expected = torch.zeros(x.shape, dtype=result, device=x.device) if options.mode == "frozen" else None
    kept = KeptScores.empty(problem.weight, problem.rows) if options.keep_scores else None
    for i, (begin, end) in enumerate(slices):
        keep = None if kept is None else kept.slice(begin, end)
        z = _logits(problem, x, begin, end, by_token=keep is not None)
        cap_slope = None if expected is None else _cap_slope(z, options.softcap)
        inside, column = _label_column(problem.labels, begin, end)
        label_logit = torch.where(inside, z.gather(1, column), label_logit[:, None]).squeeze(1)
        if tables.mean is not None:
            tables.mean[i] = z @ _shares(problem, begin, end, z)
        _replace_(z, inside, column, LOWEST)
        if tables.top is not None:
            tables.top[i] = z.argmax(1) + begin
        before, maximum = maximum, torch.maximum(maximum, z.amax(1, keepdim=True))  # so far
        there = keep is not None and keep.dtype == z.dtype
        scores = _scale_(torch.sub(z, maximum, out=keep if there else z), problem.inverse_temperature)
        exponentials = _exponentials_(scores if tables.weighted is None else scores.clone())
        tables.maximum[i] = maximum.squeeze(1)
        tables.total[i] = exponentials.sum(1)
        if tables.weighted is not None:
            tables.weighted[i] = torch.linalg.vecdot(scores.clamp_(min=LOWEST), exponentials)
        if tables.squares is not None:
            tables.squares[i] = exponentials.square().sum(1)
        if keep is not None and not there:
            keep.copy_(exponentials)
        if expected is not None:
            expected.mul_(_scale_(before - maximum, problem.inverse_temperature).exp_())
            exponentials = exponentials if cap_slope is None else exponentials.mul_(cap_slope)
            w = _operand(problem.weight[begin:end], options.dtype)
            _mm_into(expected, exponentials.to(x.dtype), w, add=True)
        del z, scores, exponentials, cap_slope  # or two slices would be alive when the next is made
    strip_maximum = tables.maximum.T
    if options.group:
        tables, label_logit = gather_strips(problem, tables, label_logit, problem.inverse_temperature, torch.exp)
    rows = merge(tables, label_logit, problem.labels_of_all_ranks, problem.inverse_temperature)
    if kept is not None:
        return Forward(rows, cache=kept.memory, strip_maximum=strip_maximum)
    if expected is None:
        return Forward(rows)
    share = _scale_((maximum - rows.maximum[:, None]), problem.inverse_temperature).sub_(rows.log_sum[:, None]).exp_()
    return Forward(rows, _unit_d_hidden(problem, rows, label_logit, expected.mul_(share)))


def keep_again(problem: Problem, strip_maximum: Tensor) -> Tensor:
    """The memory with what `forward` kept in it, to the bit."""
    x = _operand(problem.hidden, problem.options.dtype)
    kept = KeptScores.empty(problem.weight, problem.rows)
    for i, (begin, end) in enumerate(_slices(problem)):
        keep = kept.slice(begin, end)
        if keep is not None:
            z = _logits(problem, x, begin, end, by_token=True).sub_(strip_maximum[:, i, None])
            scores = _scale_(z, problem.inverse_temperature)
            keep.copy_(scores if problem.options.wants("entropy") else _exponentials_(scores))
    return kept.memory


def _unit_d_hidden(problem: Problem, rows: RowStatistics, label_logit: Tensor, expected: Tensor) -> Tensor:
    """(1 - p_y) cap'_y W[y] - expected, the sum of p_v cap'_v W[v] over the others."""
    at_label = rows.miss
    if problem.options.softcap is not None:
        at_label = at_label * _cap_slope(label_logit, problem.options.softcap)
    if not problem.vocabulary:
        return -expected
    inside, label = _label_column(problem.labels, 0, problem.vocabulary)
    w = problem.weight.index_select(0, label.squeeze(1)).to(problem.options.dtype)
    if problem.options.group:
        w = w.masked_fill(~inside, 0)  # it is another rank's
    return torch.addcmul(-expected, w.to(expected.dtype), at_label[:, None])


def merge(
    tables: Tables, label_logit: Tensor, labels: Tensor, inverse_temperature: float | Tensor
) -> RowStatistics:
    """All strips of a row and its label, (N,)."""
    others = tables.maximum.amax(0)
    maximum = torch.maximum(others, label_logit)
    distance = (tables.maximum - others) * inverse_temperature
    share = distance.exp()
    total = (share * tables.total).sum(0)
    # log of the others' exponentials relative to the label's
    difference = total.log() + (others - label_logit) * inverse_temperature
    logps = -(difference.clamp(min=0) + difference.abs().neg().exp().log1p())
    label_score, score = (((z - maximum) * inverse_temperature).clamp(min=LOWEST) for z in (label_logit, others))
    # Where the label is the largest, log(1 + the others) = -logp keeps its digits.
    log_sum = torch.where(label_logit >= others, -logps, (total * score.exp() + label_score.exp()).log())
    result = RowStatistics(logps, maximum, log_sum, miss=difference.sigmoid())
    result = result._replace(lse=maximum * inverse_temperature + log_sum)
    if tables.weighted is not None:
        # Every term is of one sign, where lse - sum p z would cancel.
        weighted = (share * (tables.weighted + tables.total * distance)).sum(0) + total * score
        weighted = weighted * score.exp() + label_score * label_score.exp()
        result = result._replace(entropy=log_sum - weighted * log_sum.neg().exp())
    if tables.squares is not None:
        squares = (share.square() * tables.squares).sum(0) * score.exp().square() + label_score.exp().square()
        result = result._replace(log_sum_p2=squares.log() - 2 * log_sum)
    if tables.mean is not None:
        result = result._replace(mean_logit=tables.mean.sum(0) * inverse_temperature)
    if tables.top is not None:
        top = tables.top.gather(0, tables.maximum.argmax(0, keepdim=True)).squeeze(0).long()
        label_is_top = (label_logit > others) | (label_logit == others) & (labels < top)  # the first of equal ones
        result = result._replace(top1=torch.where(label_is_top, labels, top))
    return result


def backward(
    problem: Problem,
    forward: Forward,
    gradients: Gradients,
    *,
    need_hidden: bool,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """Write d_weight (V, H) and d_bias (V,) where given; return dX (N, H), float32 or float64, where needed."""
    rows = forward.rows
    upstream = Upstream.of(problem, rows, gradients)
    at_label = _label_gradient(rows, upstream)[:, None]
    x = _operand(problem.hidden, problem.options.dtype)
    d_hidden = torch.zeros(x.shape, dtype=rows.logps.dtype, device=x.device) if need_hidden else None
    native = d_weight is not None and _native_bfloat16(problem, d_weight)
    kept = None if not problem.options.keep_scores else KeptScores(forward.cache, problem.rows, problem.features)

    def logit_gradient(i: int, begin: int, end: int) -> Tensor:
        """(N, end - begin) of dS, and its part of d_bias."""
        cap_slope = None
        scores = None if kept is None else kept.slice(begin, end)
        if scores is None:
            scores = _logits(problem, x, begin, end)
            cap_slope = _cap_slope(scores, problem.options.softcap)
            scores = _scale_(scores.sub_(rows.maximum[:, None]), problem.inverse_temperature)
            ds = _logit_gradient_(scores, rows, upstream)
        else:
            raised = _scale_((forward.strip_maximum[:, i] - rows.maximum)[:, None], problem.inverse_temperature)
            if rows.entropy is not None:
                ds = _logit_gradient_(scores + raised, rows, upstream)
            else:
                ds = scores * (raised - rows.log_sum[:, None]).exp_().mul_(upstream.probability[:, None]).neg_()
        _replace_(ds, *_label_column(problem.labels, begin, end), at_label)
        if upstream.mean is not None:
            ds.addr_(upstream.mean, _shares(problem, begin, end, ds))
        if cap_slope is not None:
            ds.mul_(cap_slope)
        if d_bias is not None:
            d_bias[begin:end] = ds.sum(0)
        return ds

    slices = list(enumerate(_slices(problem)))
    if native and kept is not None:
        # Of one bfloat16 product of all that is kept dX is rounded once.
        here = [(i, (begin, end)) for i, (begin, end) in slices if kept.slice(begin, end) is not None]
        slices = slices[len(here) :]
        for i, (begin, end) in here:
            kept.slice(begin, end).copy_(logit_gradient(i, begin, end))
        if need_hidden and here:
            last = here[-1][1][1]
            d_hidden += kept.slice(0, last) @ problem.weight[:last]
        for _, (begin, end) in here:
            # Copied: dW lies in the memory of what is read, which `contiguous` would leave there where N >= H.
            ds = kept.slice(begin, end).T.clone(memory_format=torch.contiguous_format)
            torch.mm(ds, problem.hidden, out=d_weight[begin:end])
    for i, (begin, end) in slices:
        ds = logit_gradient(i, begin, end).to(x.dtype)
        if d_weight is not None:
            _mm_into(d_weight[begin:end], (ds.bfloat16() if native else ds).T, problem.hidden if native else x)
        if need_hidden:
            _mm_into(d_hidden, ds, _operand(problem.weight[begin:end], problem.options.dtype), add=True)
        del ds  # or two slices would be alive when the next is made
    return d_hidden


def _logit_gradient_(scores: Tensor, rows: RowStatistics, upstream: Upstream) -> Tensor:
    """In place: from scores minus the row's largest to dS without the label, the mean and cap'."""
    if upstream.entropy is None:
        return _exponentials_(scores).mul_((-upstream.probability * rows.log_sum.neg().exp())[:, None])
    log_p = scores.sub_(rows.log_sum[:, None]).clamp_(min=LOWEST)  # 0 log 0 = 0
    p = _exponentials_(log_p.clone())
    slope = log_p.add_(rows.entropy[:, None]).mul_(upstream.entropy[:, None]).add_(upstream.probability[:, None])
    return slope.mul_(p).neg_()


def _label_gradient(rows: RowStatistics, upstream: Upstream) -> Tensor:
    """(N,) of dS at the label without the mean and cap'."""
    gradient = upstream.probability * rows.miss
    if upstream.label is not None:
        gradient = gradient + upstream.label
    if upstream.entropy is not None:
        gradient = gradient - upstream.entropy * rows.logps.exp() * (rows.logps.clamp(min=LOWEST) + rows.entropy)
    return gradient


def _shares(problem: Problem, begin: int, end: int, like: Tensor) -> Tensor:
    """(end - begin,) of the tokens in the mean of the logits."""
    if problem.mean_shares is None:
        return like.new_full((end - begin,), 1 / problem.tokens)
    return problem.mean_shares[begin:end].to(like.dtype)

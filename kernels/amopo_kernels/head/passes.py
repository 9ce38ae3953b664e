"""The order of work of the head for both Triton backends: which kernel runs on which columns, and what is kept.

    U = N V H multiply-adds, one matmul is 2 U FLOP
    exact       forward 2 U;  per slice of columns: dS (2 U recomputed), dW[slice] (2 U), dX32 (2 U)        8 U
    cached      a share f of the columns keeps its probabilities from the forward                  (8 - 2 f) U
    frozen      the weight needs no gradient: the forward accumulates dX per unit of g                      4 U

`fused` runs all matmuls in its own kernels and never stores a float32 logit; `chunked` asks the vendor's library for a
slice of float32 logits at a time. Everything else is shared.

Leaving out tiles of negligible gradient ("filtered") was tried and removed: docs/kernels.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import kept_probabilities
from .engines import ENGINES, Engine
from .launch import Slices
from .layout import Layout, Slicing, slice_buffer
from .log_sum_exp import LogSumExp
from .logit_gradient import LogitGradient
from .merge_strips import merge_strips
from .problem import Exponentials, Forward, Gradients, Problem, RowStatistics, StripStatistics, Upstream
from .vocabulary_shard import gather_strips


def forward(problem: Problem) -> Forward:
    """Statistics of every row, and what the options' mode keeps for the backward."""
    options = problem.options
    engine = ENGINES[options.backend]
    layout = Layout.of(problem.hidden, problem.vocabulary, options)
    statistics = StripStatistics.empty(problem, layout.strip)
    if options.mode == "frozen":
        return _forward_with_unit_gradient(problem, engine, layout, statistics)
    cache = problem.hidden.new_empty(problem.rows, layout.cache_width) if layout.cached else None

    def score_all(slices: Slicing, kept: Exponentials | None) -> None:
        if problem.rows and slices:
            score = engine.scores.scores(problem, layout.strip, LogSumExp.of(statistics, kept), layout.width)
            for begin, end in slices:
                score(begin, end)

    at_once = not engine.slices_forward
    score_all(layout.cached_slices(at_once=at_once), Exponentials(cache))
    score_all(layout.other_slices(at_once=at_once), None)
    # A view would keep all of it.
    strip_maximum = statistics.tables.maximum[: layout.cached_strips].clone() if layout.cached else None
    return Forward(_merge(problem, statistics), cache=cache, strip_maximum=strip_maximum)


def _merge(problem: Problem, statistics: StripStatistics) -> RowStatistics:
    if not problem.options.group:
        return merge_strips(problem, statistics)
    scoring = problem.scoring
    scale = scoring.scale if scoring.row_scale is None else scoring.row_scale
    tables, label_logit = gather_strips(problem, statistics.tables, statistics.label_logit, scale, torch.exp2)
    return merge_strips(
        replace(problem, labels=problem.labels_of_all_ranks), StripStatistics(statistics.strip, tables, label_logit)
    )


def _forward_with_unit_gradient(
    problem: Problem, engine: Engine, layout: Layout, statistics: StripStatistics
) -> Forward:
    """Also accumulates sum over columns of 2^((z - reference) scale) cap' W without the label's, and makes dX of it."""
    if not (problem.rows and problem.vocabulary):
        return Forward(_merge(problem, statistics), _zeros(problem))
    # How far a strip may exceed its row's reference, and how far above 1 the largest one is put, in bits.
    # float16 holds up to 2^16, and small probabilities keep their digits above 2^-14.
    limit, headroom = (15.0, 14.0) if problem.hidden.dtype == torch.float16 else (32.0, 0.0)
    parts = engine.gradients.new_d_hidden(problem)
    reference = torch.full_like(statistics.label_logit, -1e30)
    p = slice_buffer(problem.hidden, layout.width)
    epilogue = LogSumExp.of(statistics, Exponentials(p, reference, limit))
    score = engine.scores.scores(problem, layout.strip, epilogue, layout.width)
    raise_reference = kept_probabilities.raise_reference(problem, p, statistics, reference, parts, limit, headroom)
    add_to_d_hidden = engine.gradients.d_hidden(problem, p, parts)
    for begin, end in layout.other_slices():
        score(begin, end)
        raise_reference(begin, end)
        add_to_d_hidden(begin, end)
    d_hidden, rows = _sum(parts), _merge(problem, statistics)
    kept_probabilities.finish_unit_gradient(problem, rows, reference, d_hidden)
    return Forward(rows, d_hidden)


def backward(
    problem: Problem,
    forward: Forward,
    gradients: Gradients,
    *,
    need_hidden: bool,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """Write d_weight (V, H) and d_bias (V,) where given; return dX (N, H) float32 where needed. For modes but "frozen".

    Kept exponentials serve every gradient but, with a softcap, entropy's and the mean logit's: there all is recomputed.
    """
    if not (problem.rows and problem.vocabulary):
        for gradient in (d_weight, d_bias):
            if gradient is not None:
                gradient.zero_()
        return _zeros(problem) if need_hidden else None
    options = problem.options
    engine = ENGINES[options.backend]
    layout = Layout.of(problem.hidden, problem.vocabulary, options)
    upstream = Upstream.of(problem, forward.rows, gradients)
    if problem.hidden.dtype == torch.float16:
        upstream = upstream.scaled_for_float16(problem, forward.rows)
    of_logps_alone = not any(x is not None for x in gradients[1:])
    narrow = not of_logps_alone or d_bias is not None  # column sums of a wide strip spill in float16
    strip = engine.scores.strip_columns(problem.hidden.device, options.dtype, narrow)
    ds = slice_buffer(problem.hidden, layout.width)
    parts = engine.gradients.new_d_hidden(problem) if need_hidden else None
    of_slice = []
    if d_weight is not None:
        of_slice.append(engine.gradients.d_weight(problem, ds, upstream, d_weight))
    if need_hidden:
        of_slice.append(engine.gradients.d_hidden(problem, ds, parts))

    def gradients_of(slices: Slicing, blocks: int, make_ds: Callable[[LogitGradient], Slices]) -> None:
        if not slices:
            return
        # Zeros: tiles of rows that do not count are skipped.
        partial = None if d_bias is None else torch.zeros(blocks, layout.width, dtype=torch.float32, device=ds.device)
        steps = [make_ds(LogitGradient.of(forward.rows, upstream, ds, partial)), *of_slice]
        for begin, end in slices:
            for step in steps:
                step(begin, end)
            if d_bias is not None:
                d_bias[begin:end] = partial.sum(0)[: end - begin]

    def recompute(epilogue: LogitGradient) -> Slices:
        return engine.scores.scores(problem, strip, epilogue, layout.width)

    def read_cache(epilogue: LogitGradient) -> Slices:
        return kept_probabilities.cached_gradient(
            problem, layout.strip, forward.cache, forward.strip_maximum, epilogue
        )

    cached, recomputed = layout.cached_slices(), layout.other_slices()
    if options.softcap is not None and (upstream.entropy is not None or upstream.mean is not None):
        cached, recomputed = (), cached + recomputed
    gradients_of(cached, kept_probabilities.row_blocks(problem, layout.strip), read_cache)
    gradients_of(recomputed, engine.scores.row_blocks(problem), recompute)
    if not need_hidden:
        return None
    d_hidden = _sum(parts)
    return d_hidden if upstream.hidden_scale is None else d_hidden.mul_(upstream.hidden_scale[:, None])


def _zeros(problem: Problem) -> Tensor:
    return problem.hidden.new_zeros(problem.rows, problem.features, dtype=torch.float32)


def _sum(parts: Tensor) -> Tensor:
    """(splits, N, H) -> (N, H)."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)

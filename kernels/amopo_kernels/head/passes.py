"""The order of work of the head for both Triton backends: which kernel runs on which columns, and what is kept.

    U = N V H multiply-adds, one matmul is 2 U FLOP
    exact       forward 2 U;  per slice of columns: dS (2 U recomputed), dW[slice] (2 U), dX32 (2 U)        8 U
    cached      a share f of the columns keeps its probabilities from the forward                  (8 - 2 f) U
    frozen      the weight needs no gradient: the forward accumulates dX per unit of g                      4 U

`fused` runs all matmuls in its own kernels and never stores a float32 logit; `chunked` asks the vendor's library for a
slice of float32 logits at a time. Everything else is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import triton
from torch import Tensor

from . import chunked, kept_probabilities, launch, logit_gradient, score_loop, slice_gradients
from .merge_strips import merge_tiles
from .problem import Probabilities, Problem, RowStatistics, TileStatistics, Upstream


@dataclass(frozen=True)
class Engine:
    """The kernels of a backend; signatures as in the modules of `fused`."""

    scores: ModuleType  # tile_lse, strip_columns
    dlogits: ModuleType  # dlogits, row_tiles
    gradients: ModuleType  # d_weight_slice, add_d_hidden
    slices_forward: bool  # the forward runs slice by slice, too


ENGINES = {
    "fused": Engine(score_loop, logit_gradient, slice_gradients, slices_forward=False),
    "chunked": Engine(chunked, chunked, chunked, slices_forward=True),
}


@dataclass(frozen=True)
class Forward:
    rows: RowStatistics
    unit_d_hidden: Tensor | None = None  # (N, H) float32: dX per unit of upstream gradient / temperature
    cache: Tensor | None = None  # (N, C) matmul dtype: label-excluded probabilities of the first C columns
    tile_lse: Tensor | None = None  # (strips, N) float32: of the cache's columns


def slice_columns(hidden: Tensor, dtype: torch.dtype) -> int:
    """Columns of a slice: a multiple of a tile's, whose tiles fill the grid's waves best.

    About 4096, or as many as make dS 32 MB in 16 bits, which stay in L2; fewer would read and write dX32 too often, and
    cost launches where there are few rows.
    """
    if launch.INTERPRETED:
        return 128
    tiles, processors = launch.tiles(hidden.device, dtype), launch.processors(hidden.device)
    rows, features = hidden.shape
    splits = slice_gradients.splits_of_d_hidden(hidden, tiles.d_hidden)

    def waves(height: int, width: int, tile: launch.Tile) -> int:
        return triton.cdiv(triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns), processors)

    def time_per_column(columns: int) -> float:
        scores = waves(rows, columns, tiles.scores) * features
        d_weight = waves(columns, features, tiles.d_weight) * rows
        d_hidden = waves(rows * splits, features, tiles.d_hidden) * columns / splits
        return (scores + d_weight + d_hidden) / columns

    about = min(max(4096, 2**24 // max(rows, 1) // 256 * 256), 32768)
    return min(range(about * 3 // 4, about * 3 // 2 + 1, 256), key=time_per_column)


def cached_columns(hidden: Tensor, vocabulary: int, dtype: torch.dtype, cache_bytes: int) -> int:
    """How many columns' probabilities fit in a number of bytes: whole slices, or the whole vocabulary."""
    rows = hidden.shape[0]
    columns = cache_bytes // (rows * dtype.itemsize) if rows else 0
    if columns >= vocabulary:
        return vocabulary
    step = slice_columns(hidden, dtype)
    return columns // step * step


def cache_width(cached: int, vocabulary: int) -> int:
    """Columns of the cache's tensor: the vocabulary's last tile is written whole."""
    return cached if cached < vocabulary else _padded(cached)


def strip_columns(hidden: Tensor, dtype: torch.dtype, backend: str, entropy: bool, keeps_probabilities: bool) -> int:
    return ENGINES[backend].scores.strip_columns(hidden.device, dtype, entropy or keeps_probabilities)


def _slices(begin: int, end: int, step: int):
    return ((first, min(first + step, end)) for first in range(begin, end, step))


def _padded(columns: int) -> int:
    """Columns of a buffer that kernels fill tile by tile."""
    return triton.cdiv(columns, 256) * 256


def forward(
    problem: Problem,
    backend: str,
    ignore_index: int,
    *,
    entropy: bool = False,
    unit_gradient: bool = False,
    cached: int = 0,
) -> Forward:
    """
    Args:
        unit_gradient: accumulate dX per unit of gradient (frozen head).
        cached: columns whose probabilities are kept.
    """
    engine = ENGINES[backend]
    step, vocabulary = slice_columns(problem.hidden, problem.hidden.dtype), problem.vocabulary
    strip = strip_columns(problem.hidden, problem.hidden.dtype, backend, entropy, unit_gradient or cached > 0)
    statistics = TileStatistics.empty(problem, strip, entropy)
    d_hidden = cache = reference = None
    if not problem.rows:
        unit = _no_rows(problem) if unit_gradient else None
        return Forward(_merge(problem, statistics, ignore_index), unit)
    if unit_gradient:
        d_hidden, reference = _accumulate_unit_gradient(problem, engine, statistics, step)
    else:
        if cached:
            cache = problem.hidden.new_empty(problem.rows, cache_width(cached, vocabulary))
        for begin, end in _slices(0, cached, step):
            engine.scores.tile_lse(problem, begin, end, statistics, Probabilities(cache[:, begin:]))
        for begin, end in _slices(cached, vocabulary, step if engine.slices_forward else vocabulary):
            engine.scores.tile_lse(problem, begin, end, statistics)
    rows = _merge(problem, statistics, ignore_index)
    if unit_gradient:
        kept_probabilities.finish_unit_gradient(problem, rows, reference, d_hidden)
    kept = statistics.lse[: triton.cdiv(cached, strip)].clone() if cached else None  # a view would keep all of it
    return Forward(rows, d_hidden, cache, kept)


def _merge(problem: Problem, statistics: TileStatistics, ignore_index: int) -> RowStatistics:
    return RowStatistics(
        *merge_tiles(statistics.lse, statistics.entropy, statistics.label_score, problem.labels, ignore_index)
    )


def _accumulate_unit_gradient(
    problem: Problem, engine: Engine, statistics: TileStatistics, step: int
) -> tuple[Tensor, Tensor]:
    """sum over columns of 2^(u - reference) cap' W, without the label's: ((N, H) float32, reference (N,))."""
    # How far a strip may exceed its row's reference, and how far above 1 the largest one is put, in bits.
    # float16 holds up to 2^16, and small probabilities keep their digits above 2^-14.
    limit, headroom = (15.0, 14.0) if problem.hidden.dtype == torch.float16 else (32.0, 0.0)
    parts = engine.gradients.new_d_hidden(problem)
    reference = torch.full_like(statistics.label_score, -1e30)
    rescale = torch.empty_like(reference)
    p = problem.hidden.new_empty(problem.rows, _padded(min(step, problem.vocabulary)))
    for begin, end in _slices(0, problem.vocabulary, step):
        engine.scores.tile_lse(problem, begin, end, statistics, Probabilities(p, reference, limit))
        kept_probabilities.raise_reference(p, begin, end, statistics, reference, rescale, limit, headroom)
        engine.gradients.add_d_hidden(problem, begin, end, p, parts, rescale)
    return _sum(parts), reference


def backward(
    problem: Problem,
    backend: str,
    forward: Forward,
    grad: Tensor,
    grad_entropy: Tensor | None,
    *,
    need_hidden: bool,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """Write d_weight and d_bias where given; return dX (N, H) float32 where needed.

    Args:
        grad, grad_entropy: (N,), of the log-probabilities and of the entropies.
        d_weight: (V, H). d_bias: (V,). Any floating dtype.
    """
    engine = ENGINES[backend]
    step, vocabulary = slice_columns(problem.hidden, problem.hidden.dtype), problem.vocabulary
    if not problem.rows:
        for gradient in (d_weight, d_bias):
            if gradient is not None:
                gradient.zero_()
        return _no_rows(problem) if need_hidden else None
    upstream = Upstream.of(problem, forward.rows, grad, grad_entropy)
    cached = 0 if forward.cache is None else min(forward.cache.shape[1], vocabulary)
    strip = strip_columns(problem.hidden, problem.hidden.dtype, backend, entropy=False, keeps_probabilities=True)
    width = _padded(min(step, vocabulary))
    ds = problem.hidden.new_empty(problem.rows, width)
    parts = engine.gradients.new_d_hidden(problem) if need_hidden else None
    for begin, end in [*_slices(0, cached, step), *_slices(cached, vocabulary, step)]:
        in_cache = end <= cached
        partial = None
        if d_bias is not None:
            blocks = kept_probabilities.row_blocks(problem, strip) if in_cache else engine.dlogits.row_tiles(problem)
            partial = torch.empty(blocks, width, dtype=torch.float32, device=grad.device)
        if in_cache:
            kept_probabilities.cached_dlogits(
                problem, begin, end, forward.rows, upstream, forward.cache, forward.tile_lse, strip, ds, partial
            )
        else:
            engine.dlogits.dlogits(problem, begin, end, forward.rows, upstream, ds, partial)
        if d_weight is not None:
            engine.gradients.d_weight_slice(problem, begin, end, ds, upstream, d_weight)
        if need_hidden:
            engine.gradients.add_d_hidden(problem, begin, end, ds, parts)
        if d_bias is not None:
            d_bias[begin:end] = partial.sum(0)[: end - begin]
    if not need_hidden:
        return None
    d_hidden = _sum(parts)
    return d_hidden if upstream.hidden_scale is None else d_hidden.mul_(upstream.hidden_scale[:, None])


def _no_rows(problem: Problem) -> Tensor:
    return problem.hidden.new_empty(0, problem.features, dtype=torch.float32)


def _sum(parts: Tensor) -> Tensor:
    """(splits, N, H) -> (N, H)."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)

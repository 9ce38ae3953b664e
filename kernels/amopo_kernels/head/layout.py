"""How a call cuts the vocabulary, by rule: slices, strips, and the columns whose probabilities are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch, slice_gradients
from .engines import ENGINES
from .options import SLICE_LOGITS, Options

BUFFER = 256  # columns; buffers that kernels fill tile by tile hold a multiple
BUFFER_ROWS = 128  # the same of rows: the most of any kernel's tile
Slicing = tuple[tuple[int, int], ...]  # (first column, the one behind the last) of every slice


@dataclass(frozen=True)
class Layout:
    """In columns."""

    vocabulary: int
    step: int  # of a slice
    strip: int  # of what the forward's epilogue finishes at a time and writes the statistics of
    cached: int  # the first ones, whose probabilities are kept: whole slices, or the whole vocabulary

    @staticmethod
    def of(hidden: Tensor, vocabulary: int, options: Options) -> Layout:
        """hidden: (N, H), of which shape and device are read."""
        step = slice_columns(hidden, options.dtype, options.backend)
        cached = 0
        if options.mode == "cached" and hidden.shape[0]:
            fit = options.cache_bytes // (hidden.shape[0] * options.dtype.itemsize)
            cached = vocabulary if fit >= vocabulary else fit // step * step
        narrow = options.extra_tables or options.mode == "frozen" or cached > 0
        strip = ENGINES[options.backend].scores.strip_columns(hidden.device, options.dtype, narrow)
        return Layout(vocabulary, step, strip, cached)

    @property
    def width(self) -> int:
        """Of a buffer for one slice."""
        return _padded(min(self.step, self.vocabulary), BUFFER)

    @property
    def cache_width(self) -> int:
        """Of the cache: the vocabulary's last tile is written whole."""
        return self.cached if self.cached < self.vocabulary else _padded(self.cached, BUFFER)

    @property
    def cached_strips(self) -> int:
        return launch.blocks(self.cached, self.strip)

    def cached_slices(self, *, at_once: bool = False) -> Slicing:
        """With `at_once`, as one."""
        return _slices(0, self.cached, max(self.vocabulary, 1) if at_once else self.step)

    def other_slices(self, *, at_once: bool = False) -> Slicing:
        """What is not cached."""
        return _slices(self.cached, self.vocabulary, max(self.vocabulary, 1) if at_once else self.step)


@functools.lru_cache(64)
def _slices(begin: int, end: int, step: int) -> Slicing:
    return tuple((first, min(first + step, end)) for first in range(begin, end, step))


def _padded(size: int, block: int) -> int:
    return launch.blocks(size, block) * block


def slice_buffer(hidden: Tensor, width: int) -> Tensor:
    """(N, width) for one slice, in the dtype of hidden (N, H). Behind its rows there is memory for a whole tile's,
    which epilogues write and nothing reads."""
    rows = hidden.shape[0]
    return hidden.new_empty(_padded(rows, BUFFER_ROWS), width)[:rows]


def slice_columns(hidden: Tensor, dtype: torch.dtype, backend: str) -> int:
    """Columns of a slice: a multiple of BUFFER, whose tiles fill the grid's waves best.

    About as many as give SLICE_LOGITS, but 4096 to 32768. Every slice reads and writes dX32 and costs
    launches: with `fused` on an H200, 16384 columns for 4096 rows took 12 % less than 4096 at H = 896 and 2 % less at
    H = 5120 (benchmarks/NOTES.md), though dS of 128 MB does not stay in L2. `chunked` writes float32 logits too.
    """
    if launch.INTERPRETED:
        return 128
    tiles, processors = launch.tiles(hidden.device, dtype), launch.processors(hidden.device)
    traced = any(isinstance(size, torch.SymInt) for size in hidden.shape)
    find = _slice_columns.__wrapped__ if traced else _slice_columns
    return find(*hidden.shape, tiles, processors, SLICE_LOGITS[backend])


@functools.lru_cache(4096)  # a call asks several times, and numbers of rows recur
def _slice_columns(rows: int, features: int, tiles: launch.Configuration, processors: int, logits: int) -> int:
    scores, d_weight, d_hidden = tiles.scores, tiles.d_weight, tiles.d_hidden
    blocks = launch.blocks
    row_tiles, feature_tiles = blocks(rows, scores.rows), blocks(features, d_weight.columns)
    output_tiles = blocks(rows, d_hidden.rows) * blocks(features, d_hidden.columns)
    splits = slice_gradients.splits_of_d_hidden(output_tiles, processors)
    output_waves = blocks(output_tiles * splits, processors)

    def time_per_column(columns: int) -> float:
        score_waves = blocks(row_tiles * blocks(columns, scores.columns), processors)
        weight_waves = blocks(feature_tiles * blocks(columns, d_weight.rows), processors)
        return (score_waves * features + weight_waves * rows) / columns + output_waves * features / splits

    about = min(max(4096, logits // max(rows, 1)), 32768) // BUFFER
    candidates = range(about * 3 // 4, about * 3 // 2 + 1, max(1, about // 64))
    return min((BUFFER * n for n in candidates), key=time_per_column)

"""How a call cuts the vocabulary, by rule: slices, strips, and the columns whose probabilities are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import launch, slice_gradients
from .engines import ENGINES
from .options import Options

BUFFER = 256  # columns; buffers that kernels fill tile by tile hold a multiple


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
        step = slice_columns(hidden, options.dtype)
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
        return _padded(min(self.step, self.vocabulary))

    @property
    def cache_width(self) -> int:
        """Of the cache: the vocabulary's last tile is written whole."""
        return self.cached if self.cached < self.vocabulary else _padded(self.cached)

    @property
    def cached_strips(self) -> int:
        return triton.cdiv(self.cached, self.strip)

    def cached_slices(self) -> Iterator[tuple[int, int]]:
        return _slices(0, self.cached, self.step)

    def other_slices(self, *, at_once: bool = False) -> Iterator[tuple[int, int]]:
        """What is not cached; with `at_once`, as one."""
        return _slices(self.cached, self.vocabulary, max(self.vocabulary, 1) if at_once else self.step)


def _slices(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, end)) for first in range(begin, end, step))


def _padded(columns: int) -> int:
    return triton.cdiv(columns, BUFFER) * BUFFER


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

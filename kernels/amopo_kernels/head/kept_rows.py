"""Ignored rows are left out: what they hold, NaN too, touches nothing, and they are not computed.

With `read_rows` the other rows are gathered, as many as there are. Else nothing may synchronise: all rows are put in an
order in which the ignored ones stand last and are 0, and `count` tells the Triton kernels, on the device, how many are
to be computed. They skip whole tiles of rows; a vendor's matmul does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options


@dataclass(frozen=True)
class KeptRows:
    rows: int  # N
    index: Tensor  # (M,) int64: the rows that are computed, in this order
    count: Tensor | None  # () int32: how many of them count; None: all

    @staticmethod
    def of(labels: Tensor, options: Options) -> KeptRows | None:
        """None: no row is ignored, as far as may be known."""
        if options.ignore_index is None or not len(labels):
            return None
        ignored = labels == options.ignore_index
        if options.read_rows:
            index = ignored.logical_not().nonzero().squeeze(1)
            return None if len(index) == len(labels) else KeptRows(len(labels), index, None)
        order = torch.argsort(ignored.to(torch.uint8), stable=True)
        return KeptRows(len(labels), order, ignored.logical_not().sum(dtype=torch.int32))

    def take(self, x: Tensor | None, fill: float = 0) -> Tensor | None:
        """(N, ...) to (M, ...), `fill` in rows that do not count."""
        return None if x is None else self._without_others(x.index_select(0, self.index), fill)

    def put(self, x: Tensor | None) -> Tensor | None:
        """(M, ...) to (N, ...), 0 elsewhere. Changes x."""
        if x is None:
            return None
        return x.new_zeros(self.rows, *x.shape[1:]).index_copy_(0, self.index, self._without_others(x, 0))

    def _without_others(self, x: Tensor, fill: float) -> Tensor:
        if self.count is None:
            return x
        others = torch.arange(len(x), device=x.device) >= self.count
        return x.masked_fill_(others.view(-1, *[1] * (x.dim() - 1)), fill)

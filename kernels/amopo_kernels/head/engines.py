"""The kernels of the two Triton backends behind one signature each."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from . import chunked, score_loop, slice_gradients


@dataclass(frozen=True)
class Engine:
    """Signatures as in the modules of `fused`."""

    scores: ModuleType  # scores, strip_columns, row_blocks
    gradients: ModuleType  # d_weight, new_d_hidden, d_hidden
    slices_forward: bool  # the forward runs slice by slice, too


ENGINES = {
    "fused": Engine(score_loop, slice_gradients, slices_forward=False),
    "chunked": Engine(chunked, chunked, slices_forward=True),
}

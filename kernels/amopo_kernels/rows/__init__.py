"""Rows gathered with repetition, and the gradient of that."""

from .gather import gather_rows, inverse_index, segment_sum_rows

__all__ = ["gather_rows", "inverse_index", "segment_sum_rows"]

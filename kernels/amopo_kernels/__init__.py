"""Preference-loss kernels over a language-model head, for any trainer. `reference` is the readable oracle of each."""

from . import reference
from .cross_entropy import linear_cross_entropy
from .errors import (
    BackendUnavailableError,
    DoubleBackwardError,
    ReleasedTensorError,
    ShardedTensorError,
    UnsupportedError,
)
from .head import linear_logps
from .loss import amopo_loss, linear_amopo_loss
from .rows import gather_rows, inverse_index, segment_sum_rows
from .statistics import linear_sequence_stats, sequence_stats
from .types import AMoPOLoss, SequenceStats

__all__ = [
    "AMoPOLoss",
    "BackendUnavailableError",
    "DoubleBackwardError",
    "ReleasedTensorError",
    "SequenceStats",
    "ShardedTensorError",
    "UnsupportedError",
    "amopo_loss",
    "gather_rows",
    "inverse_index",
    "linear_amopo_loss",
    "linear_cross_entropy",
    "linear_logps",
    "linear_sequence_stats",
    "reference",
    "segment_sum_rows",
    "sequence_stats",
]

__version__ = "0.1.0"

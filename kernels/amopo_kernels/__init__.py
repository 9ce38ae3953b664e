"""Preference-loss kernels over a language-model head. Built so far: the oracle (`reference`), result and error types."""

from . import reference
from .errors import BackendUnavailableError, DoubleBackwardError, ShardedTensorError, UnsupportedError
from .types import AMoPOLoss, SequenceStats

__all__ = [
    "AMoPOLoss",
    "BackendUnavailableError",
    "DoubleBackwardError",
    "SequenceStats",
    "ShardedTensorError",
    "UnsupportedError",
    "reference",
]

UNFINISHED = ("amopo_loss", "linear_amopo_loss", "linear_logps", "linear_sequence_stats", "sequence_stats")


def __getattr__(name: str):
    if name in UNFINISHED:
        raise UnsupportedError(
            f"amopo_kernels.{name} has no backend yet; use amopo_kernels.reference.{name}, which materialises all logits."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

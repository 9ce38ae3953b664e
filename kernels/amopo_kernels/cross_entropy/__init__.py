"""The usual losses of a linear head over its log-probabilities."""

from .linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

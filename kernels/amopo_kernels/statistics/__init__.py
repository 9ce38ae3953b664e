"""What a preference loss needs to know of every sequence: sums, lengths, mean and deviation of probabilities."""

from .sequences import linear_sequence_stats, sequence_stats

__all__ = ["linear_sequence_stats", "sequence_stats"]

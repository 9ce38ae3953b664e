"""From the statistics of sequences to a loss."""

from .amopo import amopo_loss, linear_amopo_loss

__all__ = ["amopo_loss", "linear_amopo_loss"]

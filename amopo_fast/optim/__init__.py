"""AdamW where plain float32 does not fit: low-bit states, stochastic rounding, step in the backward pass."""

from amopo_fast.optim.adamw import AdamW

__all__ = ["AdamW"]

"""AdamW where plain float32 does not fit: low-bit states, stochastic rounding, step in the backward pass."""

from amopo_fast.optim.adamw import AdamW
from amopo_fast.optim.choose import IN_BACKWARD, applied_in_backward, backward_grad_norm, choose_optimizer

__all__ = ["IN_BACKWARD", "AdamW", "applied_in_backward", "backward_grad_norm", "choose_optimizer"]

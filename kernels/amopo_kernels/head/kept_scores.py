"""What the `torch` backend keeps of its forward on a CPU: scores, or their exponentials, in the memory of the gradient.

    slice of columns begin to end    kept: (N, end - begin) at begin max(N, H)    dW[slice]: (end - begin, H) at begin H

dW has V H numbers and all exponentials N V. The backward reads a slice and writes its dW, in the order of the
vocabulary; what it writes ends where the next slice begins, or before, so nothing is overwritten that is yet to be
read. With N <= H all of the vocabulary is kept and no logit is computed twice; else the first slices, a share H / N.
No memory is needed beyond that of the gradient, but from the forward on.

One more number behind dW says whether it was written: a second backward of the same graph computes the logits again.
It travels with what it is about through hooks that save tensors elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptScores:
    memory: Tensor  # (V H + 1,) of weight's dtype
    rows: int  # N
    features: int  # H

    @staticmethod
    def empty(weight: Tensor, rows: int) -> KeptScores:
        memory = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
        memory[-1] = 0
        return KeptScores(memory, rows, weight.shape[1])

    def slice(self, begin: int, end: int) -> Tensor | None:
        """(N, end - begin), or None where it does not fit."""
        first = begin * max(self.rows, self.features)
        last = first + self.rows * (end - begin)
        return None if last >= len(self.memory) else self.memory[first:last].view(self.rows, end - begin)


def are_spent(memory: Tensor) -> bool:
    return bool(memory[-1])


def become_gradient(memory: Tensor, weight: Tensor) -> Tensor:
    """An empty dW in the memory, which counts as spent from here on."""
    # Not a view: autograd would take what the backward writes for a change of what it saved.
    memory = torch.empty(0, dtype=memory.dtype).set_(
        memory.untyped_storage(), memory.storage_offset(), memory.shape, memory.stride()
    )
    memory[-1] = 1
    return torch.empty(0, dtype=memory.dtype).set_(memory.untyped_storage(), memory.storage_offset(), weight.shape)

"""What the `torch` backend keeps of its forward on a CPU: scores, or their exponentials, in the memory of the gradient.

    token v, row n of X: number v max(N, H) + n            dW[v]: H numbers from v H on

The backward writes dW[v] in the order of the vocabulary, after it has read what is kept of v; that ends where what is
kept of the next token begins, or before. With N <= H all of the vocabulary is kept and no logit is computed twice; else
its first part, a share H / N. No memory is needed beyond that of the gradient, but from the forward on.

One more number behind dW says whether it was written: a second backward of the same graph fills new memory. It travels
with what it is about through hooks that save tensors elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptScores:
    memory: Tensor  # (V H + 1,) of the weight's dtype
    rows: int  # N
    features: int  # H

    @staticmethod
    def empty(weight: Tensor, rows: int) -> KeptScores:
        memory = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
        memory[-1] = 0
        return KeptScores(memory, rows, weight.shape[1])

    def slice(self, begin: int, end: int) -> Tensor | None:
        """(N, end - begin), of which the first dimension is contiguous; None where it does not fit."""
        stride = max(self.rows, self.features)
        last = (end - 1) * stride + self.rows
        if last >= len(self.memory):
            return None
        return self.memory[begin * stride : last].as_strided((self.rows, end - begin), (1, stride))


def are_spent(memory: Tensor) -> bool:
    return bool(memory[-1])


def become_gradient(memory: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(the memory, dW, which is yet to be written in it); it counts as spent from here on.

    Not views of what was given: autograd would take what the backward writes for a change of what it saved.
    """
    first, memory = memory.storage_offset(), memory.untyped_storage()
    length = weight.numel() + 1
    whole = torch.empty(0, dtype=weight.dtype).set_(memory, first, (length,))
    whole[-1] = 1
    return whole, torch.empty(0, dtype=weight.dtype).set_(memory, first, weight.shape)

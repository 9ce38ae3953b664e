"""The AdamW update of one flat tensor in plain torch: torchao's arithmetic, all in float32, in bounded pieces.

    p <- p - lr wd p;   m <- lerp(m, g, 1 - b1);   v <- lerp(v, g^2, 1 - b2)
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps)

The update uses the moments before they are quantised. Stochastic rounding adds 16 random bits below a bfloat16 and
drops them: a number between two bfloat16 goes to the upper one with the probability of its distance from the lower.
At learning rates of 1e-7 to 1e-5 an update is far below half a bfloat16 step, and rounding to nearest would lose
every one of them. The random bits are a function of (seed, step, parameter, piece), so no other random state is touched
and a parameter may be updated in pieces of whole PIECEs, in any order.
Infinities and NaN stay what they are: a carry out of a NaN's bits would make a finite number of it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from amopo_fast.optim.states import Moment

PIECE = 1 << 22  # elements; about 40 bytes of temporaries each: 160 MiB at a time


@dataclass(frozen=True)
class Step:
    """The numbers of one parameter's update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    count: int  # t, from 1
    seed: int | None  # 63 bits for stochastic rounding; None rounds to nearest

    @property
    def bias_correction1(self) -> float:
        return 1 - self.beta1**self.count

    @property
    def bias_correction2_sqrt(self) -> float:
        return math.sqrt(1 - self.beta2**self.count)


def rounding_seed(seed: int, count: int, parameter: int) -> int:
    """An integer in [2^62, 2^63) that depends on each argument; never so small that Triton takes it for 32 bits."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, count, parameter), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2 | 1 << 62


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16; the expectation of the result is x. NaN gives NaN."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    return rounded.masked_fill_(x.isnan(), float("nan")).bfloat16()


@torch.no_grad()
def update_(
    parameter: Tensor,  # (n,) float32 or bfloat16
    grad: Tensor,  # (n,), any float dtype
    exp_avg: Moment,
    exp_avg_sq: Moment,
    step: Step,
    grad_scale: Tensor | None = None,  # () float32; NaN: leave everything as it is
    first: int = 0,  # of the elements given, in the whole parameter; a multiple of PIECE
) -> None:
    """Update parameter and moments in place."""
    if grad_scale is not None and bool(grad_scale.isnan()):
        return
    generator = None if step.seed is None else torch.Generator(parameter.device)
    for begin in range(0, parameter.numel(), PIECE):
        end = min(begin + PIECE, parameter.numel())
        p = parameter[begin:end]
        m, v = exp_avg.slice(begin, end), exp_avg_sq.slice(begin, end)
        g = grad[begin:end].float()
        if grad_scale is not None:
            g = g * grad_scale
        p32 = p.float()
        p32 = p32 - step.lr * step.weight_decay * p32
        m32 = m.read().lerp(g, 1 - step.beta1)
        v32 = v.read().lerp(g.square(), 1 - step.beta2)
        m.write(m32)
        v.write(v32)
        denominator = v32.sqrt() / step.bias_correction2_sqrt + step.eps
        p32 = p32 - step.lr * (m32 / step.bias_correction1) / denominator
        if generator is not None:
            p32 = round_stochastically(p32, generator.manual_seed(step.seed + (first + begin) // PIECE))
        p.copy_(p32)

"""What one call of the head computes, as the kernels take it: operands, statistics, upstream gradient.

A NamedTuple goes to a kernel whole; a None in it is a constant there and compiles to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options


class Scoring(NamedTuple):
    """What makes scores of logits, and says which of them count."""

    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64
    rows: int
    vocabulary: int
    softcap: float | None
    scale: float  # from a capped logit to a score in bits: log2(e) / temperature


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # (N, H) in the matmuls' dtype, last dimension contiguous
    weight: Tensor  # (V, H) likewise
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64
    options: Options

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def features(self) -> int:
        return self.hidden.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def scoring(self) -> Scoring:
        scale = math.log2(math.e) / self.options.temperature
        return Scoring(self.bias, self.labels, self.rows, self.vocabulary, self.options.softcap, scale)


@dataclass(frozen=True)
class StripStatistics:
    """What the forward leaves of every strip of columns. T strips."""

    strip: int  # columns
    lse: Tensor  # (T, N) float32, in bits, without the label
    entropy: Tensor | None  # (T, N) float32, in bits
    label_score: Tensor  # (N,) float32, in bits; NaN where the label is outside the vocabulary

    @staticmethod
    def empty(problem: Problem, strip: int) -> StripStatistics:
        def table() -> Tensor:
            return torch.empty(
                -(-problem.vocabulary // strip), problem.rows, dtype=torch.float32, device=problem.hidden.device
            )

        label_score = torch.full((problem.rows,), float("nan"), dtype=torch.float32, device=problem.hidden.device)
        return StripStatistics(strip, table(), table() if problem.options.entropy else None, label_score)


@dataclass(frozen=True)
class Probabilities:
    """Where the forward keeps label-excluded probabilities 2^(u - base) * cap' of a slice of columns.

    base is the strip's own lse; or, if `reference` is given, the row's reference unless the strip exceeds it by more
    than `limit` bits.
    """

    out: Tensor  # (N, columns of the slice, padded to strips), matmul dtype
    reference: Tensor | None = None  # (N,) float32, in bits
    limit: float = 0.0


@dataclass(frozen=True)
class RowStatistics:
    """What the backward needs of every row; (N,) float32."""

    logps: Tensor  # in nats
    lse: Tensor  # in bits
    miss: Tensor  # 1 - p_y
    entropy: Tensor | None  # in nats


@dataclass(frozen=True)
class Upstream:
    """The gradient that reaches the rows, divided by the temperature.

    In float16 the gradient would underflow in dS, and so would the probabilities of a row that is certain of its label.
    There dS is divided by the row's size, |g| (1 - p_y), and the size stands on the rows of X (relative to the call's
    largest), on dW (`weight_scale`) and on the rows of dX (`hidden_scale`). Sizes are powers of two, so that they round
    nothing; 2^9 more keeps 1 / V out of float16's subnormal numbers, and entropy's log p inside its range.
    """

    grad: Tensor  # (N,) float32
    grad_entropy: Tensor | None  # (N,) float32
    hidden: Tensor  # (N, H) the operand of dS^T X
    hidden_scale: Tensor | None = None  # (N,) float32
    weight_scale: Tensor | None = None  # () float32

    @staticmethod
    def of(problem: Problem, rows: RowStatistics, grad: Tensor, grad_entropy: Tensor | None) -> Upstream:
        grad = grad.float() / problem.options.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy.float() / problem.options.temperature
        if problem.hidden.dtype != torch.float16:
            return Upstream(grad, grad_entropy, problem.hidden)
        size = grad.abs() if grad_entropy is None else torch.maximum(grad.abs(), grad_entropy.abs())
        size = torch.frexp(size * rows.miss).exponent
        size = torch.ldexp(torch.ones_like(grad), size)
        largest = size.amax()
        raised = 2.0**9 / size
        return Upstream(
            grad * raised,
            None if grad_entropy is None else grad_entropy * raised,
            problem.hidden * (size / largest)[:, None].half(),
            size / 2.0**9,
            largest / 2.0**9,
        )

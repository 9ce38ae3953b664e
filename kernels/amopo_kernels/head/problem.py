"""What one call of the head computes, as the kernels take it: operands, statistics, upstream gradient.

A logit is z = cap(x . w_v + b_v), a score is z / temperature. Sums of exponentials are kept beside the logit that they
are relative to, never as one log-sum-exp: where all logits are near 10^4, that number would have three decimals.
A NamedTuple goes to a kernel whole; a None in it is a constant there and compiles to nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options

LOWEST = -1e30  # a logit that adds nothing; finite, so that differences of two of them are numbers


class Scoring(NamedTuple):
    """What makes scores of products, and says which of them count."""

    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64
    rows: int  # N
    count: Tensor | None  # () int32: rows from here on are not computed; None: all N are
    vocabulary: int
    softcap: float | None
    scale: float  # from a logit to a score in bits: log2(e) / temperature
    row_scale: Tensor | None  # (N,) float32, the same where every row has a temperature
    mean_share: float  # of a token in the mean of the logits
    mean_shares: Tensor | None  # (V,) float32, the same where tokens differ


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # (N, H); of the Triton backends in the matmuls' dtype, rows contiguous and apart
    weight: Tensor  # (V, H) likewise
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64, counted from the weight's first row
    options: Options
    temperature: Tensor | None = None  # (N,) float; None: options.temperature
    mean_shares: Tensor | None = None  # (V,) float; None: 1 / V
    count: Tensor | None = None  # () int32: rows from here on are not computed

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
    def tokens(self) -> int:
        """In the vocabulary, on all ranks."""
        return self.options.vocabulary or self.vocabulary

    @property
    def labels_of_all_ranks(self) -> Tensor:
        return self.labels + self.options.first

    @property
    def inverse_temperature(self) -> float | Tensor:
        """A number, or (N,)."""
        return 1 / (self.options.temperature if self.temperature is None else self.temperature)

    def for_triton(self) -> Problem:
        """Operands in the matmuls' dtype, and what kernels index in one piece."""
        return replace(
            self, hidden=self._operand(self.hidden), weight=self._operand(self.weight), labels=self.labels.contiguous(),
            bias=None if self.bias is None else self.bias.contiguous(),
        )  # fmt: skip

    def _operand(self, x: Tensor) -> Tensor:
        x = x.to(self.options.dtype)
        # Rows that share memory, as expand makes them, are no matrix that a tensor descriptor can name.
        return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()

    @functools.cached_property
    def scoring(self) -> Scoring:
        """As the Triton kernels take it."""
        row_scale = None if self.temperature is None else math.log2(math.e) / self.temperature.float()
        return Scoring(
            self.bias, self.labels, self.rows, self.count, self.vocabulary, self.options.softcap,
            math.log2(math.e) / self.options.temperature, row_scale, 1 / max(self.tokens, 1), self.mean_shares,
        )  # fmt: skip


class Tables(NamedTuple):
    """Statistics of strips of columns, (T, N) each, of all columns but the label's. T strips.

    Exponentials are of scores minus the strip's largest: 2^ in the Triton backends and e^ in `torch`. None: not wanted.
    """

    maximum: Tensor  # the largest logit
    total: Tensor  # sum of the exponentials
    weighted: Tensor | None  # sum of each times its exponent, for the entropy
    squares: Tensor | None  # sum of their squares
    mean: Tensor | None  # sum of the logits' shares in their mean, the label's too
    top: Tensor | None  # int32, the token of the largest logit

    @staticmethod
    def empty(problem: Problem, strips: int, dtype: torch.dtype = torch.float32) -> Tables:
        def table(wanted: str | None = None, dtype: torch.dtype = dtype) -> Tensor | None:
            if wanted is not None and not problem.options.wants(wanted):
                return None
            return torch.empty(strips, problem.rows, dtype=dtype, device=problem.hidden.device)

        return Tables(
            table(), table(), table("entropy"), table("log_sum_p2"), table("mean_logit"), table("top1", torch.int32)
        )


@dataclass(frozen=True)
class StripStatistics:
    """What the Triton forward leaves of every strip of columns."""

    strip: int  # columns
    tables: Tables
    label_logit: Tensor  # (N,) float32; NaN where the label is outside the vocabulary

    @staticmethod
    def empty(problem: Problem, strip: int) -> StripStatistics:
        label_logit = torch.full((problem.rows,), float("nan"), dtype=torch.float32, device=problem.hidden.device)
        return StripStatistics(strip, Tables.empty(problem, -(-problem.vocabulary // strip)), label_logit)


@dataclass(frozen=True)
class Exponentials:
    """Where the forward keeps label-excluded exponentials 2^((z - base) scale) * cap'.

    Of the vocabulary's first columns, base being the strip's own maximum. Or, if `reference` is given, of one slice,
    base being the row's reference unless the strip exceeds it by more than `limit` bits.
    """

    out: Tensor  # (N, columns, padded to strips), matmul dtype
    reference: Tensor | None = None  # (N,) float32, a logit
    limit: float = 0.0


class RowStatistics(NamedTuple):
    """What is known of every row after the forward; (N,) float32 or float64. None: not wanted."""

    logps: Tensor  # in nats
    maximum: Tensor  # the largest logit
    log_sum: Tensor  # log of the sum of e^((z - maximum) / temperature): bits in the Triton backends, nats in `torch`
    miss: Tensor  # 1 - p_y
    entropy: Tensor | None = None  # in nats
    lse: Tensor | None = None  # of the scores, in nats: one number, without the digits that maximum and log_sum keep
    mean_logit: Tensor | None = None  # of the scores
    top1: Tensor | None = None  # int64
    log_sum_p2: Tensor | None = None


@dataclass(frozen=True)
class Forward:
    """Of a call's rows, and what the options' mode keeps for the backward."""

    rows: RowStatistics
    unit_d_hidden: Tensor | None = None  # (N, H) float32: dX per unit of upstream gradient / temperature
    cache: Tensor | None = None  # (N, C) matmul dtype: label-excluded exponentials of the first C columns
    strip_maximum: Tensor | None = None  # (strips, N) float32: what each is relative to; of `torch` (N, slices)


class Gradients(NamedTuple):
    """What reaches the outputs of a row, (N,) each; None: nothing."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None


@dataclass(frozen=True)
class Upstream:
    """The gradient that reaches a row's logits z_v, but for cap', in terms of its probabilities p_v:

        dS_v = -probability p_v + mean share_v - entropy p_v (log p_v + entropy of the row)
        dS_y = probability (1 - p_y) + label + mean share_y - entropy p_y (log p_y + entropy of the row)

    (N,) each, divided by the temperature; `scaled_for_float16` says what the scales are.
    """

    probability: Tensor
    label: Tensor | None
    mean: Tensor | None
    entropy: Tensor | None
    hidden: Tensor  # (N, H) the operand of dS^T X
    hidden_scale: Tensor | None = None  # (N,) float32: what the row's dS was divided by
    weight_scale: Tensor | None = None  # () float32

    @staticmethod
    def of(problem: Problem, rows: RowStatistics, gradients: Gradients) -> Upstream:
        """d logp_y / d z_v = 1[y] - p_v,  d lse / d z_v = p_v,  d entropy / d z_v = -p_v (log p_v + entropy)."""

        def scaled(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(rows.logps.dtype) * problem.inverse_temperature

        logps, entropy, lse, mean = map(scaled, gradients)
        probability = torch.zeros_like(rows.logps) if logps is None else logps
        if lse is not None:
            probability = probability - lse
        return Upstream(probability, lse, mean, entropy, problem.hidden)

    def scaled_for_float16(self, problem: Problem, rows: RowStatistics) -> Upstream:
        """In float16 the gradient would underflow in dS, and so would the probabilities of a row that is certain of its
        label.

        There dS is divided by the row's size, about its largest entry, and the size stands on the rows of X (relative
        to the call's largest), on dW (`weight_scale`) and on the rows of dX (`hidden_scale`). Sizes are powers of two,
        so that they round nothing; 2^9 more keeps 1 / V out of float16's subnormal numbers, and entropy's log p inside
        its range.
        """
        size = self.probability.abs()
        if self.entropy is not None:
            size = torch.maximum(size, self.entropy.abs())
        size = size * rows.miss
        if self.label is not None:
            size = size + self.label.abs()
        if self.mean is not None:
            shares = problem.mean_shares
            size = size + self.mean.abs() * (1 / problem.tokens if shares is None else shares.abs().amax())
        size = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent)
        largest = size.amax()
        raised = 2.0**9 / size

        def divided(x: Tensor | None) -> Tensor | None:
            return None if x is None else x * raised

        return Upstream(
            self.probability * raised, divided(self.label), divided(self.mean), divided(self.entropy),
            self.hidden * (size / largest)[:, None].half(), size / 2.0**9, largest / 2.0**9,
        )  # fmt: skip

"""What a run minimises: from a row's statistics to its loss and to every number that is reported of a pair.

    objective(stats, batch) -> Outcome(loss, columns)

The trainer, its evaluation, `amopo-fast eval`, metrics, failed-step files and pictures know an objective by this call
and by the names of its columns alone.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amopo_kernels import SequenceStats, amopo_loss


@dataclass(frozen=True)
class Batch:
    """What an objective needs beside the statistics of P pairs in K dimensions."""

    num_dimensions: int  # K
    num_pairs: Tensor | int | None = None  # the loss is a sum over pairs divided by it; () or int, default P
    noise: Tensor | None = None  # (P, K, 2) float32 standard normal; an evaluation has none
    reference_logps: Tensor | None = None  # (P * K * 2,) sums of the label log-probs under the reference model
    num_chosen_tokens: Tensor | int | None = None  # of chosen responses, which a mean over tokens divides by; () or int
    score_gaps: Tensor | None = None  # (P, K) score of the chosen minus that of the rejected response; NaN: no scores


@dataclass(frozen=True)
class Outcome:
    """The loss () of a row, differentiable through `stats.logp_sum`, and columns by name, (P, K) float32, detached,
    NaN where a dimension is absent."""

    loss: Tensor
    columns: dict[str, Tensor]

    def table(self) -> Tensor:
        """(P, K, len(columns)) float32, in the order of the objective's `columns`."""
        return torch.stack(list(self.columns.values()), -1)


@dataclass(frozen=True)
class Objective(ABC):
    """Hyper-parameters, called with the statistics of a row.

    Sequences are ordered as in amopo_kernels: (pair * K + dimension) * 2 + side, side 0 chosen, 1 rejected.
    """

    columns: ClassVar[tuple[str, ...]]  # names of an outcome's columns, in their order
    needs_reference: ClassVar[bool] = False  # whether `batch.reference_logps` must be there

    @abstractmethod
    def __call__(self, stats: SequenceStats, batch: Batch) -> Outcome: ...

    def for_evaluation(self) -> Objective:
        """The same objective without chance."""
        return self


# Of the statistics alone, whatever the objective: log-probs are means over a response's tokens, in nats; prob_* are
# mean and standard deviation of the token probabilities.
STATISTICS = ("logp_chosen", "logp_rejected", "prob_mean_chosen", "prob_mean_rejected", "prob_std_chosen",
              "prob_std_rejected")  # fmt: skip
# By the dimension's own scores (a tie counts nowhere, and a pair whose rejected response has the higher score the other
# way round), and by the pair: whether the chosen response is preferred. Without scores both are the latter.
ACCURACIES = ("accuracy", "preference_accuracy")
# Columns of which the mean over dimensions says nothing: they sum up to a constant or to another number.
SHARES = ("weight", "loss")


def _statistics(stats: SequenceStats, num_dimensions: int) -> Iterator[Tensor]:
    """The columns STATISTICS."""
    shape = (-1, num_dimensions, 2)
    yield from (stats.logp_sum.detach() / stats.length.clamp(min=1)).view(shape).unbind(-1)
    yield from stats.prob_mean.view(shape).unbind(-1)
    yield from stats.prob_std.view(shape).unbind(-1)


def outcome(loss: Tensor, prefers: Tensor, own: dict[str, Tensor], stats: SequenceStats, batch: Batch) -> Outcome:
    """An Outcome of an objective's own columns, the accuracies and the statistics, with absent dimensions masked.

    prefers: (P, K) bool, whether the chosen side is preferred.
    """
    num_dimensions = batch.num_dimensions
    absent = ~(stats.length > 0).view(-1, num_dimensions, 2).all(-1)
    accuracies = {"accuracy": _by_scores(prefers, batch.score_gaps), "preference_accuracy": prefers}
    columns = {**accuracies, **own, **dict(zip(STATISTICS, _statistics(stats, num_dimensions), strict=True))}
    return Outcome(loss, {name: c.detach().float().masked_fill(absent, float("nan")) for name, c in columns.items()})


def _by_scores(prefers: Tensor, score_gaps: Tensor | None) -> Tensor:
    """(P, K): whether the side with the higher score is preferred; NaN for a tie. Without scores it is the chosen."""
    if score_gaps is None:
        return prefers
    right = torch.where(score_gaps < 0, ~prefers, prefers).float()
    return right.masked_fill(score_gaps == 0, float("nan"))


WEIGHTINGS = ("gaussian", "mean", "uniform", "worst_first", "score_gap")


@dataclass(frozen=True)
class AMoPO(Objective):
    """Adaptive multi-objective preference optimization (arXiv 2506.07165; docs/mathematics.md).

    A side is preferred that has the higher mean log-prob. Own columns: margin m_k = beta * (l_w - l_l) - gamma; weight
    a_k; reward_* = beta * l; loss a_k * -log sigmoid(m_k), the dimension's share of the pair's loss.

    weighting: as `amopo_kernels.amopo_loss`, or "score_gap": in proportion to how much higher the chosen response's
        score is, nothing for a tie or a reversed pair. A dimension without scores has the mean of the pair's others; a
        pair without any has equal weights.
    tau: of "worst_first".
    dimension_weights: (K,) factors of the weights before they are normalised; None: all are 1.
    """

    beta: float = 0.8
    gamma: float = 2.0
    weighting: str = "gaussian"
    tau: float = 1.0
    dimension_weights: tuple[float, ...] | None = None
    compat: str = "paper"
    sft_coef: float = 0.0

    columns: ClassVar[tuple[str, ...]] = (*ACCURACIES, "margin", "weight", "reward_chosen", "reward_rejected", "loss",
                                          *STATISTICS)  # fmt: skip

    def __call__(self, stats: SequenceStats, batch: Batch) -> Outcome:
        """Raises ValueError as `amopo_kernels.amopo_loss`: for weighting "gaussian" without noise, say."""
        result = amopo_loss(
            stats, order="alternating", num_dimensions=batch.num_dimensions, num_pairs=batch.num_pairs,
            noise=batch.noise, prior=self._prior(stats, batch), beta=self.beta, gamma=self.gamma, tau=self.tau,
            weighting="uniform" if self.weighting == "score_gap" else self.weighting, compat=self.compat,
            sft_coef=self.sft_coef,
        )  # fmt: skip
        chosen, rejected = list(_statistics(stats, batch.num_dimensions))[:2]
        own = {
            "margin": result.margins,
            "weight": result.weights,
            "reward_chosen": result.chosen_rewards,
            "reward_rejected": result.rejected_rewards,
            "loss": result.weights * F.softplus(-result.margins),
        }
        return outcome(result.loss, chosen > rejected, own, stats, batch)

    def _prior(self, stats: SequenceStats, batch: Batch) -> Tensor | None:
        """(K,) or (P, K)."""
        own = None if self.dimension_weights is None else _on(stats.logp_sum.device, self.dimension_weights)
        if self.weighting != "score_gap" or batch.score_gaps is None:
            return own
        gaps = batch.score_gaps.clamp(min=0)
        gaps = torch.where(gaps.isnan(), gaps.nanmean(-1, keepdim=True), gaps).nan_to_num(1.0)
        return gaps if own is None else own * gaps

    def for_evaluation(self) -> AMoPO:
        """The published weighting without its noise; the others have none."""
        return dataclasses.replace(self, weighting="mean") if self.weighting == "gaussian" else self


@functools.lru_cache(maxsize=8)
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """Copied once: a copy from pageable memory waits for the device."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)

"""Other preference objectives in the same trainer: SimPO, CPO, ORPO, DPO, IPO and supervised fine-tuning.

With K = 1 they are those of TRL 1.16 (CPOTrainer with loss_type "simpo" or "sigmoid", ORPOTrainer, DPOTrainer with
loss_type "sigmoid", "ipo" or "sft"), with its names of the hyper-parameters. With more dimensions a pair's loss is the
mean over those it has. l is the mean, s the sum of a response's label log-probs, r = s - s of the reference model.

    simpo   -log sigmoid(beta (l_w - l_l) - gamma)                arXiv 2405.14734
    cpo     -log sigmoid(beta (s_w - s_l)) + cpo_alpha nll        arXiv 2401.08417
    orpo    nll - beta log sigmoid(log odds_w - log odds_l)       arXiv 2403.07691; odds = e^l / (1 - e^l)
    dpo     -log sigmoid(beta (r_w - r_l))                        arXiv 2305.18290
    ipo     (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2          arXiv 2310.12036, with lengths as in TRL
    sft     nll

nll is the mean of -log p over the label tokens of the step's chosen responses. TRL's ORPO counts the prompt's tokens
too; here a prompt is not a label. label_smoothing e of simpo and cpo: (1 - e) of the loss plus e of the loss of the
opposite margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amopo_fast.data.sources.spec import did_you_mean
from amopo_fast.errors import OptionError
from amopo_fast.training.objective import AMoPO, Batch, Objective, Outcome, outcome
from amopo_kernels import SequenceStats


@dataclass(frozen=True)
class _Sides:
    """(P, K) of the chosen and the rejected side; 0 where a dimension is absent."""

    present: Tensor
    sums: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor]
    references: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(stats: SequenceStats, batch: Batch) -> _Sides:
        shape = (-1, batch.num_dimensions, 2)
        length = stats.length.view(shape)
        present = (length > 0).all(-1)
        sums = torch.where(present[..., None], stats.logp_sum.view(shape), 0.0)
        length = length.clamp(min=1)
        reference = None
        if batch.reference_logps is not None:
            reference = torch.where(present[..., None], batch.reference_logps.to(sums).view(shape), 0.0).unbind(-1)
        return _Sides(present, sums.unbind(-1), (sums / length).unbind(-1), length.unbind(-1), reference)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Sums minus the reference model's.

        Raises:
            ValueError: the batch has none.
        """
        if self.references is None:
            raise ValueError("this objective needs the log-probs of a reference model in batch.reference_logps")
        return self.sums[0] - self.references[0], self.sums[1] - self.references[1]

    def weights(self) -> Tensor:
        """The mean over the dimensions that a pair has."""
        present = self.present.to(self.sums[0].dtype)
        return present / present.sum(-1, keepdim=True).clamp(min=1)

    def nll(self, batch: Batch) -> Tensor:
        """() -log p of the chosen responses, over the step's number of their tokens."""
        count = batch.num_chosen_tokens
        if count is None:
            count = (self.lengths[0] * self.present).sum().clamp(min=1)
        return -self.sums[0].sum() / count


@dataclass(frozen=True)
class _Preference(Objective):
    """A loss per pair and dimension from two rewards.

    Own columns: reward_* are the two sides' rewards and margin their difference, as TRL logs them; a side is preferred
    whose reward is higher; weight is 1 / the pair's dimensions; loss is the dimension's share of the pair's.
    """

    beta: float = 0.1

    columns: ClassVar[tuple[str, ...]] = AMoPO.columns

    def __call__(self, stats: SequenceStats, batch: Batch) -> Outcome:
        """Raises ValueError where reference log-probs are needed and missing."""
        sides = _Sides.of(stats, batch)
        rewards = self._rewards(sides)
        weights = sides.weights()
        losses = weights * self._losses(sides)
        pairs = max(sides.present.shape[0], 1) if batch.num_pairs is None else batch.num_pairs
        loss = losses.sum() / pairs
        share = self._nll_share()
        if share:
            loss = loss + share * sides.nll(batch)
        own = {
            "margin": rewards[0] - rewards[1],
            "weight": weights,
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "loss": losses,
        }
        return outcome(loss, rewards[0] > rewards[1], own, stats, batch)

    def _rewards(self, sides: _Sides) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _losses(self, sides: _Sides) -> Tensor:
        """(P, K)."""
        raise NotImplementedError

    def _nll_share(self) -> float:
        return 0.0

    def _scaled(self, sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.beta * sides[0], self.beta * sides[1]


def _sigmoid_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    loss = F.softplus(-margin)
    return loss if not label_smoothing else (1 - label_smoothing) * loss + label_smoothing * F.softplus(margin)


@dataclass(frozen=True)
class SimPO(_Preference):
    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    cpo_alpha: float = 0.0

    def _rewards(self, sides):
        return self._scaled(sides.means)

    def _losses(self, sides):
        return _sigmoid_loss(self.beta * (sides.means[0] - sides.means[1]) - self.gamma, self.label_smoothing)

    def _nll_share(self):
        return self.cpo_alpha


@dataclass(frozen=True)
class CPO(_Preference):
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0

    def _rewards(self, sides):
        return self._scaled(sides.sums)

    def _losses(self, sides):
        return _sigmoid_loss(self.beta * (sides.sums[0] - sides.sums[1]), self.label_smoothing)

    def _nll_share(self):
        return self.cpo_alpha


@dataclass(frozen=True)
class ORPO(_Preference):
    def _rewards(self, sides):
        return self._scaled(sides.means)

    def _losses(self, sides):
        odds = [mean - _log1mexp(mean) for mean in sides.means]
        return self.beta * F.softplus(odds[1] - odds[0])

    def _nll_share(self):
        return 1.0


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0, without cancellation on either end (Maechler 2012); absent entries (0) give 0."""
    x = torch.where(x < 0, x, -1.0)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@dataclass(frozen=True)
class DPO(_Preference):
    needs_reference: ClassVar[bool] = True

    def _rewards(self, sides):
        return self._scaled(sides.log_ratios())

    def _losses(self, sides):
        chosen, rejected = sides.log_ratios()
        return F.softplus(-self.beta * (chosen - rejected))


@dataclass(frozen=True)
class IPO(DPO):
    def _losses(self, sides):
        chosen, rejected = sides.log_ratios()
        return (chosen / sides.lengths[0] - rejected / sides.lengths[1] - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class SFT(_Preference):
    beta: ClassVar[float] = 1.0

    def _rewards(self, sides):
        return sides.means

    def _losses(self, sides):
        return torch.zeros_like(sides.means[0])

    def _nll_share(self):
        return 1.0


OBJECTIVES: dict[str, type[Objective]] = {
    "amopo": AMoPO, "simpo": SimPO, "cpo": CPO, "orpo": ORPO, "dpo": DPO, "ipo": IPO, "sft": SFT,
}  # fmt: skip


def objective_of(args: Any, dimensions: Sequence[str]) -> Objective:
    """The objective that an AMoPOConfig asks for, with the hyper-parameters that it has.

    Raises:
        OptionError: weights of dimensions that there are not.
    """
    kind = OBJECTIVES[args.objective]
    given = {field.name: getattr(args, field.name) for field in fields(kind)}
    if given.get("dimension_weights") is not None:
        given["dimension_weights"] = _by_dimension(given["dimension_weights"], dimensions)
    return kind(**{name: value for name, value in given.items() if value is not None})


def _by_dimension(weights: Mapping[str, float], dimensions: Sequence[str]) -> tuple[float, ...]:
    for name in weights:
        if name not in dimensions:
            hint = did_you_mean(name, dimensions) or f"; dimensions are {', '.join(dimensions)}"
            raise OptionError(f"dimension_weights has {name!r}, which is no dimension{hint}", "dimension_weights")
    found = tuple(float(weights.get(name, 1.0)) for name in dimensions)
    if not any(found):
        raise OptionError("dimension_weights leave no dimension a weight above 0", "dimension_weights")
    return found

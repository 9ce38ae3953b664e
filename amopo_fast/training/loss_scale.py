"""Whether the loss can tell pairs apart: said once, in a line, when the first metrics are logged.

The slope of -log sigmoid(beta d - gamma) in beta d, d = l_chosen - l_rejected, is sigmoid(gamma - beta d). Where beta
times a typical |d| is small, a pair that the model has right and one that it has wrong are pushed alike, gains of one
pay for losses of another, and the loss stays where it is. The published beta 0.8 and gamma 2 are such a case: on
SmolLM2-135M and real pairs |d| is 0.6 nats a token on average, and the two slopes are 0.82 and 0.92.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from amopo_fast.training.metrics import added
from amopo_fast.training.objective import Objective

FLAT = 1.15  # the slopes' ratio below which it is said


class LossScale:
    """Mean of |reward_chosen - reward_rejected| up to the first log line. No host synchronisation before `read`."""

    def __init__(self, objective: Objective):
        """Of an objective without gamma nothing is said: its rewards start at 0 or are of another kind."""
        self._gamma: float | None = getattr(objective, "gamma", None)
        self._beta: float = getattr(objective, "beta", 0.0)
        self._columns = [objective.columns.index(f"reward_{side}") for side in ("chosen", "rejected")]
        self._sums: torch.Tensor | None = None

    def add(self, table: torch.Tensor) -> None:
        """Of a row, (P, K, columns); entries that are NaN do not count."""
        if self._gamma is None:
            return
        chosen, rejected = (table[..., column] for column in self._columns)
        difference = (chosen - rejected).abs()
        known = ~difference.isnan()
        self._sums = added(self._sums, torch.stack([difference.nan_to_num(0.0).sum(), known.sum().to(difference)]))

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> str:
        """The line, or "" where there is nothing to say; `reduce` sums over ranks. Later calls say nothing."""
        if self._gamma is None or self._sums is None:
            return ""
        total, count = reduce(self._sums).tolist()
        gamma, self._gamma = self._gamma, None
        typical = total / max(count, 1)
        right, wrong = (1 / (1 + math.exp(sign * typical - gamma)) for sign in (1, -1))
        if not count or wrong >= FLAT * right:
            return ""
        return (
            f"beta {self._beta:g} is small for these pairs: l_chosen and l_rejected differ by "
            f"{typical / self._beta:.2g} nats a token, so with gamma {gamma:g} the loss pushes a pair that is right "
            f"({right:.2f}) and one that is wrong ({wrong:.2f}) nearly alike and falls slowly; SimPO's beta is 2 to 10 "
            "(docs/recipe.md)"
        )

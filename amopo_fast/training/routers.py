"""`--router_aux_loss_coef`: the load-balancing loss of a mixture of experts beside the objective's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from amopo_fast.models.routers import check_router_loss
from amopo_fast.training.metrics import added, total


class RouterLoss:
    """Adds coefficient * `models.routers.router_loss` of each row, by its share of the step's pairs, and logs its mean
    over pairs since the last line as `router_loss`. Nothing at coefficient 0.

    Raises:
        UnsupportedModelError: `check_router_loss`.
    """

    def __init__(self, coefficient: float, model: nn.Module):
        self.coefficient = coefficient
        self._rows: list[torch.Tensor] = []
        self._sums: torch.Tensor | None = None  # loss times pairs, pairs
        if coefficient:
            check_router_loss(model)

    def receiver(self) -> list[torch.Tensor] | None:
        """What `scoring.score` puts a row's loss into; None where it is not trained."""
        return self._rows if self.coefficient and torch.is_grad_enabled() else None

    def take(self, pairs: torch.Tensor, num_pairs: torch.Tensor | float) -> torch.Tensor | float:
        """What the last row adds to the loss; pairs: of the row, 0 for a filler. num_pairs: of the step."""
        if not self._rows:
            return 0.0
        loss = self._rows.pop()
        self._sums = added(self._sums, torch.stack([loss.detach() * pairs, pairs]).double())
        return self.coefficient * loss * pairs / num_pairs

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        if self._sums is None:
            return {}
        loss, pairs = reduce(self._sums).tolist()
        self._sums = None
        return {"router_loss": loss / pairs} if pairs else {}

    def state_dict(self) -> dict:
        return {"sums": None if self._sums is None else self._sums.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self._sums = state["sums"]

    def combine_states(self, states: list[dict], rank: int) -> dict:
        """Rank 0 takes the sums of all old ranks, the others begin empty."""
        return {"sums": None if rank else total(state["sums"] for state in states)}

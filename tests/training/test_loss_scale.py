"""The line about a loss that cannot tell pairs apart: when it is said, from what, and that it is said once."""

import logging
import math

import pytest
import torch
from run_training import trainer

from amopo_fast.training.loss_scale import FLAT, LossScale
from amopo_fast.training.objective import AMoPO
from amopo_fast.training.objectives import DPO, SimPO


def same(tensor):
    return tensor


def table(objective, differences):
    """(P, K, columns) whose rewards are beta times these differences of log-probs, the rejected one's 0."""
    found = torch.full((*differences.shape, len(objective.columns)), float("nan"))
    found[..., objective.columns.index("reward_rejected")] = 0 * differences
    found[..., objective.columns.index("reward_chosen")] = objective.beta * differences
    return found


@pytest.mark.parametrize("kind", [AMoPO, SimPO])
def test_it_is_said_where_the_slopes_are_alike(kind):
    generator = torch.Generator().manual_seed(0)
    for beta, gamma, scale in ((0.8, 2.0, 0.6), (0.8, 2.0, 3.0), (5.0, 1.0, 0.6), (2.0, 0.5, 0.02)):
        objective = kind(beta=beta, gamma=gamma)
        differences = scale * torch.randn(7, 3, generator=generator)
        differences[2, 1] = float("nan")
        said = LossScale(objective)
        for part in differences.split(2):
            said.add(table(objective, part))
        line = said.read(same)
        typical = differences.double().abs().nanmean().item()
        slopes = [1 / (1 + math.exp(-gamma + sign * beta * typical)) for sign in (1, -1)]
        assert bool(line) == (slopes[1] < FLAT * slopes[0]), (beta, gamma, scale)
        if line:
            assert f"differ by {typical:.2g} nats" in line
            assert f"right ({slopes[0]:.2f})" in line and f"wrong ({slopes[1]:.2f})" in line
        assert said.read(same) == ""


def test_ranks_count_together():
    said = LossScale(AMoPO())
    said.add(table(AMoPO(), torch.tensor([[0.1]])))
    # The other rank's two differences are large: together nothing is flat.
    assert said.read(lambda sums: sums + torch.tensor([2 * 0.8 * 5.0, 2.0])) == ""


def test_nothing_is_said_of_other_objectives_or_of_no_pair():
    said = LossScale(DPO())
    said.add(table(DPO(), torch.tensor([[0.0]])))
    assert said.read(same) == ""
    said = LossScale(AMoPO())
    said.add(table(AMoPO(), torch.tensor([[float("nan")]])))
    assert said.read(same) == ""


def test_a_run_says_it_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, 10**6, beta=0.1, gamma=2.0)
        run.train()
    assert len([line for line in run.state.log_history if "loss" in line]) > 1
    assert sum("nearly alike" in record.getMessage() for record in caplog.records) == 1

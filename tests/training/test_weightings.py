"""Weights of the dimensions: a user's own factors, by the pair's scores, by what is behind; and what a run says of its
speed."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_training import pairs, trainer

from amopo_fast.cli.evaluate import EvaluationOptions, trained_objective
from amopo_fast.errors import OptionError
from amopo_fast.packing.plan import build_plan
from amopo_fast.packing.schedule import Collator
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.objective import AMoPO, Batch
from amopo_fast.training.objectives import objective_of
from amopo_fast.training.provenance import objective_entry
from amopo_kernels import sequence_stats

PAIRS, DIMENSIONS = 4, 3
NAN = math.nan


def random_stats():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (PAIRS * DIMENSIONS * 2,), generator=generator)
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logps = (-3 * torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)).requires_grad_()
    return sequence_stats(logps, offsets), torch.randn(PAIRS, DIMENSIONS, 2, generator=generator)


def weights_of(objective, gaps=None):
    stats, noise = random_stats()
    return objective(stats, Batch(DIMENSIONS, noise=noise, score_gaps=gaps)).columns["weight"]


@pytest.mark.parametrize("weighting", ["gaussian", "mean", "uniform", "worst_first"])
def test_factors_multiply_the_weights_before_they_are_normalised(weighting):
    plain = weights_of(AMoPO(weighting=weighting))
    factors = torch.tensor([2.0, 0.5, 1.0])
    expected = plain * factors / (plain * factors).sum(-1, keepdim=True)
    torch.testing.assert_close(weights_of(AMoPO(weighting=weighting, dimension_weights=(2.0, 0.5, 1.0))), expected)
    equal = weights_of(AMoPO(weighting=weighting, dimension_weights=(1.0, 1.0, 1.0)))
    assert torch.equal(equal, plain)


def test_weights_follow_the_scores():
    gaps = torch.tensor([[2.0, 1.0, 1.0], [3.0, 0.0, -2.0], [0.0, 0.0, -1.0], [1.0, 3.0, NAN]], dtype=torch.float64)
    weights = weights_of(AMoPO(weighting="score_gap"), gaps)
    expected = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1 / 6, 3 / 6, 2 / 6]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    twice = weights_of(AMoPO(weighting="score_gap", dimension_weights=(1.0, 2.0, 0.0)), gaps)
    torch.testing.assert_close(twice[0], torch.tensor([0.5, 0.5, 0.0]))
    for unscored in (None, torch.full((PAIRS, DIMENSIONS), NAN)):
        torch.testing.assert_close(weights_of(AMoPO(weighting="score_gap"), unscored), torch.full((4, 3), 1 / 3))


def test_an_evaluation_keeps_a_weighting_without_noise():
    for weighting in ("mean", "uniform", "worst_first", "score_gap"):
        assert AMoPO(weighting=weighting).for_evaluation() == AMoPO(weighting=weighting)
    assert AMoPO(dimension_weights=(1.0, 2.0)).for_evaluation() == AMoPO(weighting="mean", dimension_weights=(1.0, 2.0))


def test_eval_weighs_as_the_model_was_trained():
    trained = AMoPO(2.0, 1.0, "score_gap", 3.0, (1.0, 2.0))
    recipe = SimpleNamespace(dimensions=("a", "b"), objective=objective_entry(trained))
    found = trained_objective(EvaluationOptions(gamma=0.5), recipe, {"gamma"}, ["a", "b"])
    assert found == AMoPO(2.0, 0.5, "score_gap", 3.0, (1.0, 2.0))
    assert trained_objective(EvaluationOptions(), recipe, {}, ["b", "a"]).dimension_weights is None
    assert trained_objective(EvaluationOptions(beta=3.0), None, {"beta"}, ["a"]) == AMoPO(3.0)


def scored_pairs(count):
    rng = np.random.default_rng(1)
    for pair in pairs(count):
        yield PairTokens(
            pair.record, pair.prompts, pair.chosen, pair.rejected, False, score_gaps=rng.integers(-1, 4, 2) / 1.0
        )


def test_the_trainer_weighs_by_the_pairs_scores(tmp_path):
    data = list(scored_pairs(6))
    run = trainer(tmp_path, weighting="score_gap", dimension_weights={"second": 3.0}, max_steps=1)
    inputs = Collator(0)([run.train_dataset[0]]) | {"plan": build_plan(data), "noise": torch.zeros(6, 2, 2)}
    inputs["score_gaps"] = torch.tensor(np.stack([pair.score_gaps for pair in data])).float()
    found = run._outcome(run.model, inputs, run.objective, 1).columns["weight"]
    prior = inputs["score_gaps"].clamp(min=0) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(found, (prior / prior.sum(-1, keepdim=True)).nan_to_num(0.0))


def config(tmp_path, **options):
    return AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)


def test_factors_are_read_by_name(tmp_path):
    for given in ({"b": 2, "c": 0}, '{"b": 2, "c": 0}'):
        read = config(tmp_path, dimension_weights=given)
        assert objective_of(read, ("a", "b", "c")).dimension_weights == (1.0, 2.0, 0.0)
        json.dumps(read.to_dict(), default=str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension_weights": {"hepfulness": 1}}, "has 'hepfulness', which is no dimension.*helpfulness"),
        ({"dimension_weights": {"helpfulness": 0, "brevity": 0.0}}, "no dimension a weight above 0"),
        ({"dimension_weights": {"brevity": -1}}, "brevity must be a number of at least 0, got int -1"),
        ({"dimension_weights": {"brevity": NAN}}, "brevity must be a number of at least 0"),
        ({"dimension_weights": {"brevity": "much"}}, "brevity must be a number"),
        ({"dimension_weights": {}}, "must map dimensions to numbers"),
        ({"dimension_weights": "brevity=2"}, "not JSON"),
        ({"dimension_weights": {"brevity": 2}, "objective": "simpo"}, "no effect with objective simpo"),
        ({"tau": 0.0, "weighting": "worst_first"}, "tau=0.0 must be positive"),
        ({"tau": 2.0}, "tau.*worst_first"),
    ],
)
def test_impossible_weights_are_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        objective_of(config(tmp_path, **options), ("helpfulness", "brevity"))


@pytest.mark.parametrize(("length", "seen"), [({"max_steps": 3}, 12), ({"num_train_epochs": 1}, 14)])
def test_a_run_says_how_many_pairs_it_took_each_second(tmp_path, length, seen):
    run = trainer(tmp_path, save_strategy="no", **length)
    result = run.train().metrics
    assert result["train_samples_per_second"] * result["train_runtime"] == pytest.approx(seen, rel=0.01)
    lines = [line for line in run.state.log_history if "pairs_per_second" in line]
    for line in lines:
        assert line["sequences_per_second"] == pytest.approx(4 * line["pairs_per_second"])
    if seen == 14:  # all of them
        expected = sum(build_plan([pair]).unshared_tokens for pair in pairs(14))
        assert lines[-1]["num_tokens"] == expected

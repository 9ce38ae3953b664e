"""The oracle against values worked out by hand and against a second way to compute each quantity."""

import math

import pytest
import torch
import torch.nn.functional as F

from amopo_kernels import SequenceStats, reference


def softplus(x):
    return math.log1p(math.exp(x))


def stats_of_one_pair():
    """K = 2. l = -1, -2 and -3, -1; probability means .5, .2 and .1, .4; deviations .1, .0 and .2, .3."""
    return SequenceStats(
        logp_sum=torch.tensor([-2.0, -6.0, -12.0, -5.0], dtype=torch.float64, requires_grad=True),
        length=torch.tensor([2, 3, 4, 5], dtype=torch.int32),
        prob_mean=torch.tensor([0.5, 0.2, 0.1, 0.4], dtype=torch.float64),
        prob_std=torch.tensor([0.1, 0.0, 0.2, 0.3], dtype=torch.float64),
        logps=torch.zeros(14, dtype=torch.float64),
    )


def test_paper_loss_weights_and_gradient_by_hand():
    stats = stats_of_one_pair()
    noise = torch.tensor([[[1.0, 7.0], [-0.5, 2.0]]])
    result = reference.amopo_loss(stats, order="alternating", num_dimensions=2, beta=0.8, gamma=2.0, noise=noise)
    margins = [0.8 * (-1 + 2) - 2, 0.8 * (-3 + 1) - 2]  # -1.2, -3.6
    scores = [(0.5 + 0.1) + 0.2, (0.1 - 0.1) + (0.4 + 0.6)]  # 0.8, 1.0
    first = 1 / (1 + math.exp(scores[1] - scores[0]))
    weights = [first, 1 - first]
    expected = sum(a * softplus(-m) for a, m in zip(weights, margins, strict=True))
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert result.weights[0].tolist() == pytest.approx(weights, rel=1e-12)
    assert result.margins[0].tolist() == pytest.approx(margins, rel=1e-12)
    assert result.chosen_rewards[0].tolist() == pytest.approx([-0.8, -2.4], rel=1e-12)
    result.loss.backward()
    slope = [a * 0.8 / (1 + math.exp(m)) for a, m in zip(weights, margins, strict=True)]
    by_hand = [-slope[0] / 2, slope[0] / 3, -slope[1] / 4, slope[1] / 5]
    assert stats.logp_sum.grad.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_upstream_at_one_pair_is_paper_over_the_dimensions():
    options = {"order": "alternating", "num_dimensions": 2, "beta": 0.8, "gamma": 2.0, "weighting": "mean"}
    paper = reference.amopo_loss(stats_of_one_pair(), **options)
    upstream = reference.amopo_loss(stats_of_one_pair(), **options, compat="upstream")
    assert upstream.loss.item() == pytest.approx(paper.loss.item() / 2, rel=1e-12)


def test_upstream_softmax_runs_over_all_pairs_together():
    one = stats_of_one_pair()
    two = SequenceStats(*(torch.cat([field.detach(), field.detach()]) for field in one))
    result = reference.amopo_loss(
        two, order="alternating", num_dimensions=2, beta=0.8, gamma=2.0, weighting="uniform", compat="upstream"
    )
    assert result.weights.flatten().tolist() == pytest.approx([0.25] * 4)
    assert result.loss.item() == pytest.approx((softplus(1.2) + softplus(3.6)) * 2 * 0.25 / 4, rel=1e-12)


def test_absent_dimension_leaves_softmax_loss_and_sft_term():
    stats = stats_of_one_pair()._replace(length=torch.tensor([2, 3, 0, 0], dtype=torch.int32))
    result = reference.amopo_loss(
        stats, order="alternating", num_dimensions=2, beta=0.8, gamma=2.0, weighting="mean", sft_coef=0.5
    )
    assert result.loss.item() == pytest.approx(softplus(1.2) + 0.5 * 1.0, rel=1e-12)
    assert result.weights[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logps_and_entropy_against_a_categorical_distribution(softcap):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (11, 5), (11,)))
    labels = torch.randint(0, 11, (7,))
    labels[2] = -100
    logps, entropy = reference.linear_logps(
        hidden, weight, labels, bias, softcap=softcap, temperature=0.7, return_entropy=True
    )
    logits = F.linear(hidden, weight, bias)
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / 0.7
    distribution = torch.distributions.Categorical(logits=logits)
    kept = labels != -100
    expected = distribution.log_prob(labels.clamp(min=0)) * kept
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, distribution.entropy() * kept, rtol=1e-12, atol=1e-12)


def test_sequence_statistics_with_empty_and_one_token_sequences():
    logps = torch.log(torch.tensor([0.5, 0.25, 0.9], dtype=torch.float64)).requires_grad_()
    stats = reference.sequence_stats(logps, torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert stats.length.tolist() == [2, 0, 1]
    assert stats.logp_sum.tolist() == pytest.approx([math.log(0.125), 0.0, math.log(0.9)])
    assert stats.prob_mean.tolist() == pytest.approx([0.375, 0.0, 0.9])
    assert stats.prob_std.tolist() == pytest.approx([0.125 * math.sqrt(2), 0.0, 0.0])


"""amopo_loss and linear_amopo_loss against the oracle, in values and gradients."""

import itertools

import pytest
import torch
from orders import assert_orders_agree

from amopo_kernels import SequenceStats, UnsupportedError, amopo_loss, linear_amopo_loss, reference

PAIRS, DIMENSIONS = 4, 3
ABSENT = {
    "none": [],
    "some": [(0, 1, 0), (0, 1, 1), (2, 0, 0), (2, 0, 1)],
    "one side": [(1, 2, 0), (3, 0, 1)],
    "a whole pair": [(1, k, side) for k in range(DIMENSIONS) for side in (0, 1)],
    "everything": list(itertools.product(range(PAIRS), range(DIMENSIONS), (0, 1))),
}
WEIGHTINGS = {
    "gaussian": "gaussian",
    "mean": "mean",
    "uniform": "uniform",
    "worst_first": "worst_first",
    "tensor": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64),
}


def random_stats(absent=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (PAIRS, DIMENSIONS, 2)
    length = torch.randint(1, 9, shape, generator=generator, dtype=torch.int32)
    mean, std = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    logp_sum = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) * length
    for index in absent:
        for field in (length, mean, std, logp_sum):
            field[index] = 0
    flat = [x.flatten().to(x.dtype if x is length else dtype) for x in (logp_sum, length, mean, std)]
    noise = torch.randn(shape, generator=generator)
    return SequenceStats(flat[0].requires_grad_(), *flat[1:], logps=torch.empty(0)), noise


def compare(options, stats, noise, tolerance=1e-12):
    results, gradients = [], []
    for function, dtype in ((amopo_loss, stats.logp_sum.dtype), (reference.amopo_loss, torch.float64)):
        leaf = stats.logp_sum.detach().to(dtype).requires_grad_()
        own = stats._replace(
            logp_sum=leaf, prob_mean=stats.prob_mean.to(dtype), prob_std=stats.prob_std.to(dtype)
        )
        result = function(
            own, order="alternating", num_dimensions=DIMENSIONS, beta=0.8, gamma=1.5, noise=noise, **options
        )
        if result.loss.requires_grad:
            result.loss.backward()
        results.append(result)
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    for name in ("loss", "weights", "margins", "chosen_rewards", "rejected_rewards"):
        a, b = (getattr(result, name) for result in results)
        assert a.shape == (() if name == "loss" else (PAIRS, DIMENSIONS))
        assert a.dtype == stats.logp_sum.dtype
        assert name == "loss" or not a.requires_grad
        torch.testing.assert_close(
            a.detach().double(), b.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=tolerance, atol=tolerance)
    return results[0]


@pytest.mark.parametrize("num_pairs", [None, 7, torch.tensor(5.0)], ids=["default", "int", "tensor"])
@pytest.mark.parametrize("sft_coef", [0.0, 0.3])
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_against_reference(weighting, compat, absent, sft_coef, num_pairs):
    stats, noise = random_stats(ABSENT[absent])
    options = {"weighting": WEIGHTINGS[weighting], "compat": compat, "sft_coef": sft_coef, "num_pairs": num_pairs}
    result = compare(options, stats, noise)
    present = (stats.length.view(PAIRS, DIMENSIONS, 2) > 0).all(-1)
    assert not any(x[~present].any() for x in result[1:])
    assert (result.weights[present] > 0).all()
    assert not result.loss.isnan()


@pytest.mark.parametrize("prior", [[2, 1, 0.5], [[1, 0, 4], [0, 0, 0], [3, 1, 2], [0, 1, 0]]], ids=["K", "PK"])
@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_prior_against_reference(weighting, compat, prior):
    stats, noise = random_stats(ABSENT["some"])
    prior = torch.tensor(prior, dtype=torch.float64)
    options = {"weighting": WEIGHTINGS[weighting], "prior": prior, "tau": 0.4, "compat": compat, "sft_coef": 0.2}
    result = compare(options, stats, noise)
    absent = (stats.length.view(PAIRS, DIMENSIONS, 2) == 0).any(-1)
    assert torch.equal(result.weights == 0, (prior == 0) | absent)
    if compat == "paper":
        some = (result.weights > 0).any(-1)
        torch.testing.assert_close(result.weights.sum(-1), some.double())


def test_the_worst_dimension_weighs_most():
    stats, _ = random_stats()
    options = {"order": "alternating", "num_dimensions": DIMENSIONS, "beta": 0.8, "gamma": 1.5,
               "weighting": "worst_first"}  # fmt: skip
    soft, sharp = (amopo_loss(stats, **options, tau=tau) for tau in (1.0, 1e-4))
    expected = torch.exp(-soft.margins) / torch.exp(-soft.margins).sum(-1, keepdim=True)
    torch.testing.assert_close(soft.weights, expected)
    assert torch.equal(sharp.weights.argmax(-1), soft.margins.argmin(-1)) and sharp.weights.amax() > 0.999


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float32(weighting):
    stats, noise = random_stats(ABSENT["some"], torch.float32)
    compare({"weighting": WEIGHTINGS[weighting], "sft_coef": 0.2}, stats, noise, 1e-5)


def test_weights_are_not_differentiated():
    stats, noise = random_stats()
    mean, std = stats.prob_mean.requires_grad_(), stats.prob_std.requires_grad_()
    amopo_loss(stats, order="alternating", num_dimensions=DIMENSIONS, beta=0.8, gamma=1.5, noise=noise).loss.backward()
    assert mean.grad is None and std.grad is None and stats.logp_sum.grad.all()


@pytest.mark.parametrize("sft_coef", [0.0, 0.3])
@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_gradcheck(compat, sft_coef):
    stats, noise = random_stats(ABSENT["some"])

    def loss(logp_sum):
        options = {"order": "alternating", "num_dimensions": DIMENSIONS, "beta": 0.8, "gamma": 1.5, "noise": noise}
        return amopo_loss(stats._replace(logp_sum=logp_sum), **options, compat=compat, sft_coef=sft_coef).loss

    assert torch.autograd.gradcheck(loss, (stats.logp_sum,))


def test_no_pairs_give_zero_with_a_graph():
    empty = torch.zeros(0, dtype=torch.float64)
    stats = SequenceStats(empty.clone().requires_grad_(), empty.int(), empty, empty, empty)
    result = amopo_loss(stats, order="alternating", num_dimensions=3, beta=0.8, gamma=1.5, weighting="mean")
    result.loss.backward()
    assert result.loss.item() == 0.0 and result.weights.shape == (0, 3)


def test_microbatches_with_one_normaliser_add_up():
    stats, noise = random_stats(ABSENT["some"])
    options = {"order": "alternating", "num_dimensions": DIMENSIONS, "beta": 0.8, "gamma": 1.5, "sft_coef": 0.2}
    whole = amopo_loss(stats, noise=noise, **options).loss
    parts = 0.0
    for pairs in (slice(0, 1), slice(1, 4)):
        rows = slice(pairs.start * DIMENSIONS * 2, pairs.stop * DIMENSIONS * 2)
        part = SequenceStats(*(field[rows] for field in stats[:4]), logps=stats.logps)
        parts = parts + amopo_loss(part, noise=noise[pairs], num_pairs=PAIRS, **options).loss
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("weighting", ["gaussian", "worst_first"])
@pytest.mark.parametrize("lengths", [[3, 1, 2, 5, 0, 0, 4, 1], [1, 1, 1, 1, 2, 0, 1, 3]])
def test_linear_against_reference(lengths, weighting, compat):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = normal(sum(lengths), 6), normal(2300, 6), normal(2300)
    labels = torch.randint(0, 2300, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    noise = torch.randn(2, 2, 2, generator=generator)
    options = {"order": "alternating", "num_dimensions": 2, "beta": 0.8, "gamma": 1.5, "noise": noise,
               "sft_coef": 0.1, "compat": compat,
               "softcap": 5.0, "temperature": 0.9, "prior": torch.tensor([0.3, 2.0]), "tau": 0.5,
               "weighting": weighting}  # fmt: skip
    if weighting != "gaussian":
        del options["noise"]
    results, gradients = [], []
    for function in (linear_amopo_loss, reference.linear_amopo_loss):
        results.append(function(hidden, weight, labels, cu_seqlens, bias, **options))
        gradients.append(torch.autograd.grad(results[-1].loss, (hidden, weight, bias)))
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_head_options_reach_the_head():
    hidden, weight, labels = torch.randn(2, 6), torch.randn(40, 6), torch.tensor([3, 5])
    with pytest.raises(UnsupportedError, match="backend 'torch'"):
        linear_amopo_loss(
            hidden, weight, labels, torch.tensor([0, 1, 2]), order="alternating", num_dimensions=1,
            beta=0.8, gamma=1.5, weighting="mean",
            backend="torch", logits_cache_bytes=1,
        )  # fmt: skip


def test_unchecked_bad_offsets_reach_the_loss_as_nan():
    hidden, weight = torch.randn(5, 6), torch.randn(40, 6)
    labels, cu_seqlens = torch.randint(0, 40, (5,)), torch.zeros(5, dtype=torch.int32)
    options = {"order": "alternating", "num_dimensions": 1, "beta": 0.8, "gamma": 1.5, "weighting": "mean"}
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_amopo_loss(hidden, weight, labels, cu_seqlens, **options)
    assert linear_amopo_loss(hidden, weight, labels, cu_seqlens, **options, validate=False).loss.isnan()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_dimensions": 5}, "24 sequences"),
        ({"num_dimensions": 0}, "24 sequences"),
        ({"noise": None}, "noise"),
        ({"noise": torch.zeros(4, 3)}, "noise"),
        ({"weighting": "median"}, "median"),
        ({"weighting": torch.ones(2)}, "one number per dimension"),
        ({"prior": torch.ones(2)}, "prior must be"),
        ({"prior": torch.ones(3, 3)}, "prior must be"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"compat": "trl"}, "trl"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    stats, noise = random_stats()
    good = {"num_dimensions": DIMENSIONS, "beta": 0.8, "gamma": 1.5, "noise": noise}
    with pytest.raises(ValueError, match=message):
        amopo_loss(stats, order="alternating", **(good | change))


@pytest.mark.parametrize("function", [amopo_loss, reference.amopo_loss])
@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_all_chosen_then_all_rejected_is_the_same_loss(function, compat):
    assert_orders_agree(function, *random_stats(ABSENT["some"]), DIMENSIONS, compat=compat, sft_coef=0.2)


def test_the_order_of_sides_must_be_said():
    stats, noise = random_stats()
    options = {"num_dimensions": DIMENSIONS, "beta": 0.8, "gamma": 1.5, "noise": noise}
    with pytest.raises(TypeError, match="order"):
        amopo_loss(stats, **options)
    with pytest.raises(ValueError, match="order='trl'; choose 'alternating'"):
        amopo_loss(stats, order="trl", **options)
    losses = [amopo_loss(stats, order=order, **options).loss for order in ("alternating", "stacked")]
    assert abs(losses[0] - losses[1]) > 1e-3

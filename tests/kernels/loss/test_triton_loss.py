"""The Triton loss against the oracle: on the GPU where there is one, else in Triton's interpreter."""

import itertools
import math

import pytest
import torch
from orders import assert_orders_agree

from amopo_kernels import DoubleBackwardError, SequenceStats, UnsupportedError, amopo_loss, linear_amopo_loss, reference
from amopo_kernels.loss import amopo, amopo_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTINGS = {
    "gaussian": "gaussian",
    "mean": "mean",
    "uniform": "uniform",
    "worst_first": "worst_first",
    "tensor": torch.tensor([0.2, 1.0, 3.0, 0.5, 1.5]),
}
FIELDS = ("loss", "weights", "margins", "chosen_rewards", "rejected_rewards")

# numpy, under the interpreter, where a pair has no entry; the kernel discards that NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(amopo, "_implementation", lambda stats: amopo_triton.amopo_loss)


def random_stats(P, K, seed=0, absent=0.2):
    """float32 statistics of P pairs, a share of the sequences empty, margins of both signs and up to +-30."""
    generator = torch.Generator().manual_seed(seed)
    shape = (P, K, 2)
    length = torch.randint(1, 200, shape, generator=generator)
    length[torch.rand(shape, generator=generator) < absent] = 0
    mean, std = (torch.rand(shape, generator=generator) * (length > 0) for _ in range(2))
    logp_sum = -20 * torch.rand(shape, generator=generator).square() * length
    fields = [logp_sum, length.int(), mean, std]
    stats = SequenceStats(*(x.flatten().to(DEVICE) for x in fields), logps=torch.empty(0, device=DEVICE))
    return stats._replace(logp_sum=stats.logp_sum.requires_grad_()), torch.randn(shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("P, K", [(3, 2), (300, 3)])
@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_all_chosen_then_all_rejected_is_the_same_loss(P, K, compat):
    assert_orders_agree(amopo_loss, *random_stats(P, K), K, tolerance=0, compat=compat, sft_coef=0.2)


def in_float64(stats):
    cpu = [field.detach().cpu() for field in stats]
    return SequenceStats(*(x.double() if x.is_floating_point() else x for x in cpu))


def assert_matches_reference(stats, noise, K, beta=0.8, gamma=1.5, upstream_gradient=1.7, tolerance=3e-6, **options):
    result = amopo_loss(stats, order="alternating", num_dimensions=K, beta=beta, gamma=gamma, noise=noise, **options)
    (gradient,) = torch.autograd.grad(result.loss * upstream_gradient, stats.logp_sum)
    oracle = in_float64(stats)
    oracle = oracle._replace(logp_sum=oracle.logp_sum.requires_grad_())
    noise = None if noise is None else noise.cpu().double()
    expected = reference.amopo_loss(
        oracle, order="alternating", num_dimensions=K, beta=beta, gamma=gamma, noise=noise, **options
    )
    expected_gradient = torch.zeros_like(oracle.logp_sum)
    if expected.loss.requires_grad:
        (expected_gradient,) = torch.autograd.grad(expected.loss * upstream_gradient, oracle.logp_sum)
    for name in FIELDS:
        value, wanted = getattr(result, name), getattr(expected, name).detach()
        assert value.dtype == torch.float32 and value.shape == wanted.shape and value.device.type == DEVICE
        assert value.requires_grad == (name == "loss")
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(
            value.detach().cpu().double(), wanted, rtol=tolerance, atol=1e-7 * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
    # Relative, entry by entry: the smallest gradient (a margin of 30) counts as much as the largest.
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=3 * tolerance, atol=0)
    return result


@pytest.mark.parametrize("compat, sft_coef", [("paper", 0.3), ("upstream", 0.3), ("paper", 0.0)])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("P, K", [(1, 1), (1, 4), (3, 5), (200, 3), (2, 300)])
def test_against_reference(P, K, weighting, compat, sft_coef):
    stats, noise = random_stats(P, K)
    weighting = WEIGHTINGS[weighting].repeat(60)[:K] if weighting == "tensor" else weighting
    assert_matches_reference(stats, noise, K, weighting=weighting, compat=compat, sft_coef=sft_coef)


@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("num_pairs", [7, torch.tensor(5), torch.tensor(2.5)], ids=["int", "int tensor", "tensor"])
def test_normaliser(num_pairs, compat):
    stats, noise = random_stats(4, 3)
    assert_matches_reference(stats, noise, 3, num_pairs=num_pairs, compat=compat, sft_coef=0.1)


@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_absent_pairs_and_no_present_entry(compat):
    stats, noise = random_stats(3, 2, absent=0.0)
    length = stats.length.clone().view(3, 2, 2)
    length[1] = 0
    stats = stats._replace(length=length.flatten())
    result = assert_matches_reference(stats, noise, 2, compat=compat, sft_coef=0.1)
    assert not result.weights[1].any() and not result.margins[1].any()
    nothing = stats._replace(length=torch.zeros_like(stats.length))
    result = assert_matches_reference(nothing, noise, 2, compat=compat, sft_coef=0.1)
    assert result.loss.item() == 0.0


def test_no_pairs_give_zero_with_a_graph():
    empty = torch.zeros(0, device=DEVICE)
    stats = SequenceStats(empty.clone().requires_grad_(), empty.int(), empty, empty, empty)
    result = amopo_loss(stats, order="alternating", num_dimensions=3, beta=0.8, gamma=1.5, weighting="mean")
    result.loss.backward()
    assert result.loss.item() == 0.0 and result.weights.shape == (0, 3) and stats.logp_sum.grad.shape == (0,)


def two_pairs():
    """Two pairs of two dimensions with round numbers; the second pair lacks its second dimension."""
    logp_sum = [-2.0, -6.0, -4.0, -4.0, -1.0, -9.0, 0.0, 0.0]
    length = [2, 3, 4, 1, 1, 3, 0, 0]
    mean = [0.5, 0.25, 0.5, 0.5, 0.75, 0.5, 0.0, 0.0]
    fields = [torch.tensor(x, device=DEVICE) for x in (logp_sum, length, mean, [0.0] * 8)]
    stats = SequenceStats(fields[0].requires_grad_(), fields[1].int(), *fields[2:], logps=fields[0].detach())
    # l = -1, -2 | -1, -4 || -1, -3      beta (l_w - l_l) - gamma with beta 1, gamma 2
    return stats, [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_hand_computed(compat):
    stats, margins = two_pairs()
    result = amopo_loss(
        stats, order="alternating", num_dimensions=2, beta=1.0, gamma=2.0, weighting="mean", compat=compat
    )
    losses = [math.log1p(math.exp(-m)) for m in margins]
    if compat == "paper":
        first = 1 / (1 + math.exp(0.25))  # scores 0.75 and 1.0
        weights, scale = [first, 1 - first, 1.0], 1 / 2
    else:
        exponentials = [math.exp(x) for x in (0.75, 1.0, 1.25)]
        weights, scale = [x / sum(exponentials) for x in exponentials], 1 / 3
    result.loss.backward()
    loss = scale * sum(a * x for a, x in zip(weights, losses, strict=True))
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.weights.flatten().tolist() == pytest.approx([*weights, 0.0], rel=1e-6)
    assert result.margins.flatten().tolist() == pytest.approx([*margins, 0.0], rel=1e-6)
    assert result.chosen_rewards.flatten().tolist() == pytest.approx([-1.0, -1.0, -1.0, 0.0])
    assert result.rejected_rewards.flatten().tolist() == pytest.approx([-2.0, -4.0, -3.0, 0.0])
    slopes = [scale * a / (1 + math.exp(m)) for a, m in zip(weights, margins, strict=True)]
    expected = [[-slope / n_w, slope / n_l] for slope, n_w, n_l in zip(slopes, (2, 4, 1), (3, 1, 3), strict=True)]
    flat = [*itertools.chain(*expected), 0.0, 0.0]
    assert stats.logp_sum.grad.tolist() == pytest.approx(flat, rel=1e-6)


@pytest.mark.parametrize("difference", [-60.0, -16.0, 0.0, 16.0, 60.0])
def test_softplus_keeps_its_digits_at_large_margins(difference):
    stats, noise = random_stats(1, 1, absent=0.0)
    with torch.no_grad():
        stats.length.fill_(1)
        stats.logp_sum.copy_(torch.tensor([-64.0, -64.0 - difference]))
    result = amopo_loss(stats, order="alternating", num_dimensions=1, beta=1.0, gamma=0.0, noise=noise)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(max(-difference, 0) + math.log1p(math.exp(-abs(difference))), rel=1e-5)
    assert stats.logp_sum.grad[1].item() == pytest.approx(1 / (1 + math.exp(difference)), rel=1e-5)


def test_nan_statistics_stay_nan():
    stats, noise = random_stats(3, 2, absent=0.0)
    for field in ("logp_sum", "prob_mean"):
        for compat in ("paper", "upstream"):
            bad = getattr(stats, field).detach().clone()
            bad[5] = float("nan")
            broken = stats._replace(**{field: bad})
            assert amopo_loss(
                broken, order="alternating", num_dimensions=2, beta=0.8, gamma=1.5, noise=noise, compat=compat
            ).loss.isnan()


def test_strided_fields_and_half_noise():
    stats, noise = random_stats(5, 3)
    wide = stats._replace(prob_mean=torch.stack([stats.prob_mean, stats.prob_mean + 1], 1)[:, 0])
    noise = noise.half()
    results = [amopo_loss(s, order="alternating", num_dimensions=3, beta=0.8, gamma=1.5, noise=n)
               for s, n in ((wide, noise), (stats, noise.float()))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_two_runs_give_the_same_bits(compat):
    stats, noise = random_stats(700, 3)
    runs = []
    for _ in range(2):
        result = amopo_loss(
            stats, order="alternating", num_dimensions=3, beta=0.8, gamma=1.5, noise=noise, compat=compat, sft_coef=0.1
        )
        runs.append([*result, *torch.autograd.grad(result.loss, stats.logp_sum)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_double_backward_is_refused():
    stats, noise = random_stats(2, 2)
    loss = amopo_loss(stats, order="alternating", num_dimensions=2, beta=0.8, gamma=1.5, noise=noise).loss
    torch.autograd.grad(loss, stats.logp_sum, retain_graph=True)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(loss, stats.logp_sum, create_graph=True)


def test_too_many_dimensions_are_refused():
    stats, noise = random_stats(1, amopo_triton.TILE + 1)
    with pytest.raises(UnsupportedError, match="512 dimensions at most"):
        amopo_loss(stats, order="alternating", num_dimensions=amopo_triton.TILE + 1, beta=0.8, gamma=1.5, noise=noise)


@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_from_hidden_states_to_gradients(backend, compat):
    """All of it in Triton: scores, statistics, loss and back; one dimension of the second pair is absent."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 5, 3, 4, 1, 2, 7, 0, 0])
    hidden = torch.randn(int(lengths.sum()), 40, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(300, 40, generator=generator) / 5).to(DEVICE).requires_grad_()
    labels = torch.randint(300, (int(lengths.sum()),), generator=generator).to(DEVICE)
    cu_seqlens = lengths.cumsum(0).int().to(DEVICE)
    noise = torch.randn(2, 2, 2, generator=generator).to(DEVICE)
    options = {
        "order": "alternating",
        "num_dimensions": 2,
        "beta": 0.8,
        "gamma": 1.5,
        "compat": compat,
        "sft_coef": 0.1,
    }
    result = linear_amopo_loss(hidden, weight, labels, cu_seqlens, noise=noise, backend=backend, **options)
    gradients = torch.autograd.grad(result.loss, (hidden, weight))
    x, w = (t.detach().cpu().double().requires_grad_() for t in (hidden, weight))
    expected = reference.linear_amopo_loss(x, w, labels.cpu(), cu_seqlens.cpu(), noise=noise.cpu().double(), **options)
    wanted = torch.autograd.grad(expected.loss, (x, w))
    for name in FIELDS:
        value, other = getattr(result, name).detach().cpu().double(), getattr(expected, name).detach()
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for value, other in zip(gradients, wanted, strict=True):
        assert (value.cpu().double() - other).norm() <= 1e-5 * other.norm()


def random_prior(rows, P, K, zeros=0.3):
    """(K,) or (P, K) positive numbers, a share of them 0, and a whole pair of zeros where there are rows."""
    generator = torch.Generator().manual_seed(K)
    shape = (P, K) if rows else (K,)
    prior = 3 * torch.rand(shape, generator=generator)
    if K > 1:
        prior[torch.rand(shape, generator=generator) < zeros] = 0
        prior[..., -1] = 2.0
    if rows:
        prior[P // 2] = 0
    return prior


@pytest.mark.parametrize("compat", ["paper", "upstream"])
@pytest.mark.parametrize("weighting", ["gaussian", "mean", "uniform", "worst_first"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("P, K", [(1, 1), (3, 5), (200, 3)])
def test_prior(P, K, rows, weighting, compat):
    stats, noise = random_stats(P, K)
    prior = random_prior(rows, P, K)
    result = assert_matches_reference(
        stats, noise, K, weighting=weighting, prior=prior, tau=0.7, compat=compat, sft_coef=0.1
    )
    assert not result.weights.cpu()[(prior == 0).expand(P, K)].any() and result.loss.isfinite()


def test_a_prior_of_ones_changes_no_bit():
    stats, noise = random_stats(50, 4)
    for compat in ("paper", "upstream"):
        options = {"order": "alternating", "num_dimensions": 4, "beta": 0.8, "gamma": 1.5, "noise": noise,
                   "compat": compat}  # fmt: skip
        plain, weighed = (amopo_loss(stats, **options, prior=prior) for prior in (None, torch.ones(4, device=DEVICE)))
        assert all(torch.equal(a, b) for a, b in zip(plain, weighed, strict=True))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("weighting", ["gaussian", "uniform", "worst_first"])
def test_opcheck(weighting, rows):
    stats, noise = random_stats(3, 5)
    prior = random_prior(rows, 3, 5).to(DEVICE) if weighting != "gaussian" else None
    noise = noise if weighting == "gaussian" else None
    torch.library.opcheck(
        torch.ops.amopo_kernels.amopo_loss.default,
        (*stats[:4], noise, prior, None, 3.0, 5, 0.8, 1.5, 0.9, weighting, False, True, 0.1),
    )


def test_compiles_without_graph_breaks():
    stats, noise = random_stats(3, 2)

    def step(stats, noise, num_pairs):
        return amopo_loss(
            stats, order="alternating", num_dimensions=2, beta=0.8, gamma=1.5, noise=noise, num_pairs=num_pairs
        )

    num_pairs = torch.tensor(4.0, device=DEVICE)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        result = function(stats, noise, num_pairs)
        results.append([*result, *torch.autograd.grad(result.loss, stats.logp_sum)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("compat", ["paper", "upstream"])
def test_cuda_graph_replays_with_new_inputs_and_noise(compat):
    stats, noise = random_stats(8, 4)
    num_pairs = torch.tensor(8.0, device=DEVICE)

    def step():
        options = {
            "order": "alternating",
            "num_dimensions": 4,
            "beta": 0.8,
            "gamma": 1.5,
            "compat": compat,
            "sft_coef": 0.1,
        }
        result = amopo_loss(stats, noise=noise, num_pairs=num_pairs, **options)
        return [*result, *torch.autograd.grad(result.loss, stats.logp_sum)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        new_stats, new_noise = random_stats(8, 4, seed=seed)
        with torch.no_grad():
            for old, new in zip((*stats, noise), (*new_stats, new_noise), strict=True):
                old.copy_(new)
            num_pairs.fill_(3.0 + seed)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_no_host_synchronisation():
    stats, noise = random_stats(8, 4)
    num_pairs = torch.tensor(8.0, device=DEVICE)
    for run in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if run else "default")
        try:
            result = amopo_loss(
                stats, order="alternating", num_dimensions=4, beta=0.8, gamma=1.5, noise=noise, num_pairs=num_pairs
            )
            torch.autograd.grad(result.loss, stats.logp_sum)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_two_launches_forward_and_backward():
    stats, noise = random_stats(8, 4)
    num_pairs, upstream = torch.tensor(8.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)

    def step():
        options = {
            "order": "alternating",
            "num_dimensions": 4,
            "beta": 0.8,
            "gamma": 1.5,
            "noise": noise,
            "num_pairs": num_pairs,
        }
        torch.autograd.grad(amopo_loss(stats, **options).loss, stats.logp_sum, upstream)
        torch.cuda.synchronize()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 2, kernels

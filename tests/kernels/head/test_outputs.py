"""What one pass can return, temperatures of rows, masked vocabularies and logits that have much in common."""

import pytest
import torch
from head_cases import ALL_BACKENDS, DEVICE, in_float64, problem, relative_error

from amopo_kernels import linear_logps, linear_sequence_stats, reference
from amopo_kernels.head.options import OUTPUTS

pytest.importorskip("triton")
DIFFERENTIABLE = ("entropy", "lse", "mean_logit")


def compare(tensors, labels, outputs, tolerance, *, backend, wanted=None, **options):
    """Values, and gradients of a random combination of what is differentiable and in `wanted`."""
    hidden, weight, bias = tensors
    exact = in_float64(*tensors)
    found = linear_logps(hidden, weight, labels, bias, outputs=outputs, backend=backend, **options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options = options | {"temperature": options["temperature"].double()}
    expected = reference.linear_logps(exact[0], exact[1], labels, exact[2], outputs=outputs, **options)
    for name, a, b in zip(("logps", *outputs), found, expected, strict=True):
        assert a.shape == labels.shape and a.requires_grad == (name in ("logps", *DIFFERENTIABLE))
        assert a.dtype == (torch.int64 if name == "top1" else torch.float32)
        bound = tolerance * (1 + b.double().abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    names = [name for name in ("logps", *outputs) if name in (wanted or ("logps", *DIFFERENTIABLE))]
    total, exact_total = 0, 0
    for name, a, b in zip(("logps", *outputs), found, expected, strict=True):
        if name in names:
            upstream = torch.randn(labels.shape, dtype=torch.float64, device=DEVICE)
            total, exact_total = total + (a * upstream.float()).sum(), exact_total + (b * upstream).sum()
    total.backward()
    exact_total.backward()
    for a, b in zip(tensors, exact, strict=True):
        if a is not None and a.requires_grad:
            assert relative_error(a.grad, b.grad) < 3 * tolerance


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    "outputs, frozen", [(OUTPUTS, False), (OUTPUTS[::-1], True), (("lse",), False), (("top1", "log_sum_p2"), True)]
)
def test_every_output_against_the_oracle(backend, outputs, frozen):
    hidden, weight, labels, bias = problem(19, 16, 150, scale=3, bias=True)
    weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    labels[[2, 9]] = -100
    compare((hidden, weight, bias), labels, outputs, 1e-5, backend=backend, softcap=6.0, temperature=0.7)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_one_output_alone_is_differentiated(backend, wanted):
    hidden, weight, labels, bias = problem(9, 16, 150, bias=True)
    compare((hidden, weight, bias), labels, DIFFERENTIABLE, 1e-5, backend=backend, wanted=(wanted,))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("validate", [None, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_row_has_a_temperature(backend, validate, frozen):
    hidden, weight, labels, bias = problem(40, 16, 150, scale=3, bias=True)
    weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    labels[5:20] = -100
    temperature = torch.rand(40, device=DEVICE) + 0.3
    temperature, labels = temperature.view(8, 5), labels.view(8, 5)
    hidden = hidden.detach().view(8, 5, 16).requires_grad_()
    exact = in_float64(hidden, weight, bias)
    options = {"outputs": () if frozen else ("entropy", "lse"), "softcap": 9.0}
    found = linear_logps(
        hidden, weight, labels, bias, temperature=temperature, backend=backend, validate=validate, **options
    )
    expected = reference.linear_logps(*exact[:2], labels, exact[2], temperature=temperature.double(), **options)
    outputs = options["outputs"]
    found, expected = (x if outputs else (x,) for x in (found, expected))
    upstream = torch.randn(8, 5, dtype=torch.float64, device=DEVICE)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    sum(x * upstream.float() for x in found).sum().backward()
    sum(x * upstream for x in expected).sum().backward()
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        assert not a.requires_grad or relative_error(a.grad, b.grad) < 2e-5


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_rows_with_temperatures_and_kept_exponentials(backend):
    hidden, weight, labels, _ = problem(21, 16, 150, scale=2)
    temperature = torch.rand(21, device=DEVICE) + 0.3
    cu_seqlens = torch.arange(22, dtype=torch.int32, device=DEVICE)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, temperature=temperature, backend=backend,
                                  softcap=9.0, logits_cache_bytes=21 * 128 * 4)  # fmt: skip
    exact = in_float64(hidden, weight)
    expected = reference.linear_logps(*exact, labels, softcap=9.0, temperature=temperature.double())
    torch.testing.assert_close(stats.logp_sum.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(21, device=DEVICE)
    stats.logp_sum.backward(upstream), expected.backward(upstream.double())
    for a, b in zip((hidden, weight), exact, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_top1_is_the_first_of_equal_tokens():
    hidden, weight = torch.ones(3, 4, device=DEVICE), torch.zeros(150, 4, device=DEVICE)
    weight[[70, 20, 140]] = 1.0
    for backend in ALL_BACKENDS:
        for label in (20, 70, 140, 3):
            labels = torch.full((3,), label, device=DEVICE)
            _, top1 = linear_logps(hidden, weight, labels, outputs=("top1",), backend=backend)
            assert top1.tolist() == [20, 20, 20]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_vocabulary(backend, mask):
    """A token that cannot be has probability 0, adds nothing to the entropy and gets no gradient."""
    hidden, weight, labels, bias = problem(12, 16, 150, bias=True)
    masked = torch.arange(150, device=DEVICE) % 3 == 1
    masked[64:128] = True  # a strip of nothing else
    labels[:] = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11, 129, 131, 132, 149], device=DEVICE)
    with torch.no_grad():
        bias[masked] = mask
    logps, entropy = linear_logps(hidden, weight, labels, bias, outputs=("entropy",), backend=backend)
    kept = [x.detach() for x in (hidden, weight[~masked], bias[~masked])]
    renumbered = (~masked).cumsum(0)[labels] - 1
    exact = [x.double().requires_grad_() for x in kept]
    expected = reference.linear_logps(*exact[:2], renumbered, exact[2], outputs=("entropy",))
    for a, b in zip((logps, entropy), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    (logps + 2 * entropy).sum().backward()
    (expected[0] + 2 * expected[1]).sum().backward()
    assert relative_error(hidden.grad, exact[0].grad) < 1e-5
    assert relative_error(weight.grad[~masked], exact[1].grad) < 1e-5 and not weight.grad[masked].any()
    assert relative_error(bias.grad[~masked], exact[2].grad) < 1e-5 and not bias.grad[masked].any()


def gradients_under_offset(function, offset, dtype, mode, seed=0):
    """(logps, dX, dW) of logits that all have about `offset` in common, which one feature adds."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(20, 16, generator=generator)
    weight = torch.randn(150, 16, generator=generator)
    hidden[:, 0], weight[:, 0] = 8.0, offset / 8
    labels = torch.randint(150, (20,), generator=generator)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    weight.requires_grad_(mode != "frozen")
    logps = function(hidden, weight, labels.to(DEVICE))
    logps.sum().backward()
    return [logps.detach(), hidden.grad] + ([] if mode == "frozen" else [weight.grad])


@pytest.mark.parametrize("backend, mode", [("torch", "exact"), ("fused", "exact"), ("fused", "cached"),
                                           ("fused", "frozen"), ("chunked", "exact")])  # fmt: skip
@pytest.mark.parametrize("offset", [1e3, -5e3, 1e4])
def test_a_common_offset_costs_what_it_costs_plain_float32(backend, mode, offset):
    def ours(hidden, weight, labels):
        cu_seqlens = torch.arange(21, dtype=torch.int32, device=DEVICE)
        cache = 20 * 128 * 4 if mode == "cached" else 0
        return linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache
        ).logp_sum

    def plain(hidden, weight, labels):
        return (hidden @ weight.T).log_softmax(1).gather(1, labels[:, None]).squeeze(1)

    exact = gradients_under_offset(reference.linear_logps, offset, torch.float64, mode)
    found, usual = (gradients_under_offset(f, offset, torch.float32, mode) for f in (ours, plain))
    for a, b, c in zip(found, usual, exact, strict=True):
        # 1.7 on an H100, which adds in another order than its library.
        assert relative_error(a, c) < 2 * relative_error(b, c) + 1e-6


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 5e3, -1e4])
def test_logits_that_float32_holds_exactly_give_exact_logps_whatever_they_have_in_common(backend, offset):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.eye(16)[torch.randint(16, (20,), generator=generator)].to(DEVICE).requires_grad_()
    weight = (torch.randint(-40, 40, (150, 16), generator=generator) / 8 + offset).to(DEVICE).requires_grad_()
    labels = torch.randint(150, (20,), generator=generator).to(DEVICE)
    logps, entropy = linear_logps(hidden, weight, labels, return_entropy=True, backend=backend)
    exact = in_float64(hidden, weight)
    expected, exact_entropy = reference.linear_logps(*exact, labels, return_entropy=True)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=2e-6, atol=2e-6)
    logps.sum().backward(), expected.sum().backward()
    assert relative_error(weight.grad, exact[1].grad) < 1e-6


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_z_loss_in_float16_keeps_its_digits_through_lse(backend):
    """Made by hand, lse = logit of the label - logp, autograd adds two float16 gradients that nearly cancel."""
    hidden, weight, labels, bias = problem(32, 16, 150, torch.float16, bias=True)
    hidden = hidden.detach().div_(4).requires_grad_()

    def by_hand(x, w, b, function, **options):
        logps = function(x, w, labels, b, **options)
        label_logit = (x.float() * w[labels].float()).sum(1) + b[labels]
        return (0.1 * (label_logit - logps).square() - logps).mean()

    def by_output(x, w, b, function, **options):
        logps, lse = function(x, w, labels, b, outputs=("lse",), **options)
        return (0.1 * lse.square() - logps).mean()

    exact = in_float64(hidden, weight, bias)
    wanted = torch.autograd.grad(by_output(*exact, reference.linear_logps), exact)
    errors = []
    for loss in (by_hand, by_output):
        found = torch.autograd.grad(loss(hidden, weight, bias, linear_logps, backend=backend), (hidden, weight, bias))
        errors.append([relative_error(a, b) for a, b in zip(found, wanted, strict=True)])
    assert all(1.3 * ours < other and ours < 3e-4 for other, ours in zip(*errors, strict=True))

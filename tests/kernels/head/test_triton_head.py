"""The head of `fused` and `chunked` against the float64 oracle: in Triton's interpreter here, on the GPU where one is.

bfloat16 is judged as DESIGN says: errors of gradients at most 1.5 times those of a reference whose dS is rounded once.
"""

import pytest
import torch

from amopo_kernels import (
    DoubleBackwardError,
    UnsupportedError,
    dispatch,
    linear_logps,
    linear_sequence_stats,
    reference,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("fused", "chunked")


def problem(rows, features, vocabulary, dtype=torch.float32, scale=1.0, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = (normal(rows, features) * scale).to(DEVICE, dtype).requires_grad_()
    weight = (normal(vocabulary, features) / features**0.5).to(DEVICE, dtype).requires_grad_()
    offset = normal(vocabulary).to(DEVICE, dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE), offset


def in_float64(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def row_errors(found, expected):
    return (found.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)


def once_rounded(hidden, weight, labels, grad, bias=None, *, softcap=None, temperature=1.0):
    """(dX, dW, db) of a reference in float64 whose dS = g (1[y] - p) cap' is rounded once to the inputs' dtype."""
    x, w = hidden.detach().double(), weight.detach().double()
    z = x @ w.T if bias is None else x @ w.T + bias.detach().double()
    slope = torch.ones_like(z)
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    at_label = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], float("-inf")).logsumexp(1, keepdim=True)
    ds = -(z - torch.logaddexp(others, at_label)).exp()
    ds.scatter_(1, labels[:, None], torch.sigmoid(others - at_label))
    ds = (ds * slope * grad.double()[:, None] / temperature).to(hidden.dtype).double()
    return tuple(g.to(hidden.dtype).double() for g in (ds @ w, ds.T @ x, ds.sum(0)))


def exact_gradients(hidden, weight, labels, grad, bias=None, **options):
    exact = in_float64(hidden, weight, bias)
    logps = reference.linear_logps(*exact[:2], labels, exact[2], **options)
    logps.backward(grad.double())
    return logps.detach(), [x.grad for x in exact if x is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap, temperature, bias", [(None, 1.0, False), (None, 0.7, True), (5.0, 1.3, True)])
def test_float32_against_reference(backend, entropy, softcap, temperature, bias):
    hidden, weight, labels, offset = problem(37, 40, 200, scale=3, bias=bias)
    labels[[0, 9]], labels[[3, 20]] = 199, -100
    options = {"softcap": softcap, "temperature": temperature, "return_entropy": entropy}
    found = linear_logps(hidden, weight, labels, offset, backend=backend, **options)
    exact = in_float64(hidden, weight, offset)
    expected = reference.linear_logps(*exact[:2], labels, exact[2], **options)
    found, expected = (x if entropy else (x,) for x in (found, expected))
    upstream = [torch.randn(x.shape, dtype=torch.float64, device=DEVICE) for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert not a[labels == -100].any()
    torch.autograd.backward(found, [u.float() for u in upstream])
    torch.autograd.backward(expected, upstream)
    for a, b in zip((hidden, weight, offset), exact, strict=True):
        if a is not None:
            assert relative_error(a.grad, b.grad) < 1e-5
    assert not hidden.grad[labels == -100].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
@pytest.mark.parametrize(
    "dtype, softcap, temperature, bias",
    [(torch.bfloat16, None, 1.0, False), (torch.bfloat16, 7.0, 0.8, True), (torch.float16, 7.0, 0.8, True)],
)
def test_sixteen_bit_errors(backend, dtype, mode, softcap, temperature, bias):
    """logp within 1e-5 (1 + max |logit|); dX per row and dW within 1.5 times the once-rounded reference's error.

    A cached probability was rounded before dS is: 1.41 times the error on average, more on single rows. A frozen
    head's are rounded before g is applied: the same error on average, other ones on single rows.
    """
    torch.manual_seed(0)
    hidden, weight, labels, offset = problem(34, 40, 200, dtype, scale=4, bias=bias)
    weight.requires_grad_(mode != "frozen")
    if bias:
        offset.requires_grad_(mode != "frozen")
    options = {"softcap": softcap, "temperature": temperature}
    cu_seqlens = torch.arange(35, dtype=torch.int32, device=DEVICE)  # one row each: a gradient of its own for each
    cache = 34 * 128 * 2 if mode == "cached" else 0
    before = dispatch.runs().get((backend, mode), 0)
    stats = linear_sequence_stats(
        hidden, weight, labels, cu_seqlens, offset, backend=backend, logits_cache_bytes=cache, **options
    )
    assert dispatch.runs()[backend, mode] == before + 1
    grad = torch.randn(34, device=DEVICE)
    stats.logp_sum.backward(grad)
    logps, exact = exact_gradients(hidden, weight.detach().requires_grad_(), labels, grad, offset, **options)
    bound = 1e-5 * (1 + (hidden.double() @ weight.double().T).abs().max())
    assert (stats.logps.double() - logps).abs().max() < bound
    once = once_rounded(hidden, weight, labels, grad, offset, **options)
    per_row = 1.5 if mode == "exact" else 2.5
    assert (row_errors(hidden.grad, exact[0]) <= per_row * row_errors(once[0], exact[0]).clamp(min=1e-3)).all()
    assert relative_error(hidden.grad, exact[0]) <= 1.5 * relative_error(once[0], exact[0])
    if mode != "frozen":
        assert relative_error(weight.grad, exact[1]) <= 1.5 * relative_error(once[1], exact[1])
        if bias:
            assert relative_error(offset.grad, exact[2]) <= 1.5 * relative_error(once[2], exact[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (1, 130), (2, 2), (17, 63), (16, 64), (33, 257)])
def test_ragged_shapes(backend, mode, rows, vocabulary):
    hidden, weight, labels, _ = problem(rows, 24, vocabulary)
    labels[-1] = vocabulary - 1
    weight.requires_grad_(mode != "frozen")
    cu_seqlens = torch.tensor([0, 0, rows], dtype=torch.int32, device=DEVICE)
    cache = rows * 256 * 4 if mode == "cached" else 0
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache)
    exact = in_float64(hidden, weight.detach().requires_grad_())
    expected = reference.linear_sequence_stats(*exact, labels, cu_seqlens)
    for found, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=2e-6)
    stats.logp_sum.sum().backward()
    expected.logp_sum.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-6)
    if mode != "frozen":
        torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-130.0, 0.0, 60.0])
def test_large_and_strongly_negative_logits(backend, dtype, shift):
    """The padding of the vocabulary's last tile would win over negative logits, were it not masked."""
    hidden, weight, labels, bias = problem(24, 24, 131, dtype, scale=12, bias=True)
    with torch.no_grad():
        bias += shift
    logps, entropy = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=True)
    exact = in_float64(hidden, weight, bias)
    expected, expected_entropy = reference.linear_logps(*exact[:2], labels, exact[2], return_entropy=True)
    largest = (exact[0] @ exact[1].T + exact[2]).abs().max().item()
    assert largest > 40
    assert (logps.double() - expected).abs().max() < 1e-5 * (1 + largest)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-4, atol=1e-5)
    logps.sum().backward()
    expected.sum().backward()
    assert relative_error(hidden.grad, exact[0].grad) < (2e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-8)])
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
@pytest.mark.parametrize("confidence", [10.0, 16.0])
def test_gradient_where_the_label_is_almost_certain(backend, dtype, tolerance, mode, confidence):
    """1 - p_y is all of the gradient, and p_y itself rounds to 1: a bf16 dS with the label inside has no digit left."""
    torch.manual_seed(1)
    labels = torch.tensor([3, 120, 199], device=DEVICE)
    hidden = torch.eye(3, 16, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(200, 16)).to(DEVICE)
    weight[labels, torch.arange(3)] = confidence + 5.3  # log(200) = 5.3
    weight = weight.to(dtype).requires_grad_(mode != "frozen")
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    cache = 3 * 200 * dtype.itemsize if mode == "cached" else 0
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache)
    stats.logp_sum.backward(torch.tensor([2.0 ** (1.4 * confidence)], device=DEVICE))  # float16 can hold the result
    x, w = in_float64(hidden, weight.detach().requires_grad_())
    logits = x @ w.T
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    expected = -torch.nn.functional.softplus(others - logits.gather(1, labels[:, None])[:, 0], threshold=1e9)
    assert expected.exp().min() > 0.9999
    torch.testing.assert_close(stats.logps.double(), expected, rtol=2e-5, atol=0)
    (expected.sum() * 2.0 ** (1.4 * confidence)).backward()
    assert row_errors(hidden.grad, x.grad).max() < tolerance
    if mode != "frozen":
        assert relative_error(weight.grad, w.grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frozen_reference_is_raised_by_later_slices(dtype):
    """Logits that climb by more than the dtype holds from one slice of columns to the next."""
    hidden, weight, labels, bias = problem(19, 24, 300, dtype, bias=True)
    with torch.no_grad():
        bias += torch.linspace(-60, 60, 300, device=DEVICE).to(dtype)
    weight.requires_grad_(False), bias.requires_grad_(False)
    labels[:10] = 299
    logps = linear_logps(hidden, weight, labels, bias, backend="fused")
    grad = torch.randn(19, device=DEVICE)
    logps.backward(grad)
    expected, exact = exact_gradients(hidden, weight.detach().requires_grad_(), labels, grad, bias)
    assert row_errors(hidden.grad, exact[0]).max() < (1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_small_gradients(backend):
    """g / (rows of a step) is below float16's smallest number; so is 1 / V."""
    hidden, weight, labels, _ = problem(20, 24, 300, torch.float16, scale=0.1)
    grad = torch.randn(20, device=DEVICE) * 2.0**-22
    grad[3] = 2.0**-30
    linear_logps(hidden, weight, labels, backend=backend).backward(grad)
    scale = 2.0**20
    _, exact = exact_gradients(hidden, weight, labels, grad)
    # What float16 can hold of the result decides, so compare where it has digits.
    for found, wanted in zip((hidden.grad, weight.grad), exact, strict=True):
        error = (found.double() - wanted).abs() * scale
        assert error.max() <= 2.0**-25 * scale + 2e-3 * (wanted.abs() * scale).max()
        assert found.any()


def test_float16_gradients_of_logits_stay_in_range():
    """Whatever g and 1 - p_y are, dS of a row is at most 2^9 and, spread over 262144 tokens, no subnormal number."""
    from amopo_kernels.head.options import Options
    from amopo_kernels.head.problem import Problem, RowStatistics, Upstream

    miss = torch.logspace(-30, 0, 40, device=DEVICE)
    grad = torch.randn(40, device=DEVICE) * torch.logspace(0, -7, 40, device=DEVICE)
    hidden, weight, labels, _ = problem(40, 8, 3, torch.float16)
    row = torch.zeros_like(miss)
    options = Options(None, 1.0, -100, False, torch.float16, "fused", "exact", 0)
    call = Problem(hidden.detach(), weight.detach(), None, labels, options)
    upstream = Upstream.of(call, RowStatistics(row, row, miss, None), grad, None)
    largest = upstream.grad.abs() * miss
    assert largest.max() <= 2**9 and largest.min() / 2**18 > 2.0**-14
    torch.testing.assert_close(upstream.grad * upstream.hidden_scale, grad, rtol=1e-6, atol=0)
    share = upstream.hidden_scale / upstream.weight_scale  # a power of two, so the operand is exact
    assert torch.equal(upstream.hidden, hidden.detach() * share.half()[:, None])


@pytest.mark.parametrize("backend, entropy", [("fused", False), ("chunked", True)])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_gradients(backend, needed, entropy):
    hidden, weight, labels, bias = problem(9, 24, 70, bias=True)
    tensors = (hidden, weight, bias)
    for bit, x in enumerate(tensors):
        x.requires_grad_(bool(needed >> bit & 1))
    found = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=entropy)
    exact = in_float64(*tensors)
    expected = reference.linear_logps(*exact[:2], labels, exact[2], return_entropy=entropy)
    (found[0].sum() + found[1].sum() * 2 if entropy else found.sum()).backward()
    (expected[0].sum() + expected[1].sum() * 2 if entropy else expected.sum()).backward()
    for bit, (a, b) in enumerate(zip(tensors, exact, strict=True)):
        assert (a.grad is not None) == bool(needed >> bit & 1)
        if a.grad is not None:
            assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight, labels, bias = problem(0, 24, 140, bias=True)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    frozen = linear_sequence_stats(hidden, weight.detach(), labels, cu_seqlens, backend=backend).logp_sum.sum()
    assert torch.autograd.grad(frozen, hidden)[0].shape == (0, 24)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, backend=backend)
    stats.logp_sum.sum().backward()
    assert not stats.logp_sum.any() and not stats.length.any() and hidden.grad.shape == (0, 24)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_rows_that_no_descriptor_can_read(backend):
    torch.manual_seed(2)
    hidden = torch.randn(26, 33, device=DEVICE)[::2, :31]  # rows of 33 floats, 31 of them used
    weight = torch.randn(31, 150, device=DEVICE).T
    labels = torch.randint(0, 150, (26,), device=DEVICE)[::2]
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_logps(hidden, weight, labels, backend=backend).sum().backward()
    _, exact = exact_gradients(hidden, weight, labels, torch.ones(13, device=DEVICE))
    assert relative_error(hidden.grad, exact[0]) < 1e-5 and relative_error(weight.grad, exact[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    results = []
    for _ in range(2):
        hidden, weight, labels, bias = problem(35, 24, 150, torch.bfloat16, bias=True)
        logps, entropy = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=True)
        (logps + 0.1 * entropy).sum().backward()
        results.append((logps, entropy, hidden.grad, weight.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_retain_graph_and_double_backward(backend):
    hidden, weight, labels, _ = problem(9, 24, 300)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    for cache in (0, 9 * 256 * 4):
        total = linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache
        ).logp_sum.sum()
        first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(linear_logps(hidden, weight, labels, backend=backend).sum(), hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_stored_without_gradients(backend):
    hidden, weight, labels, _ = problem(5, 24, 140)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    before = dispatch.runs()
    with torch.no_grad():
        assert linear_logps(hidden, weight, labels, backend=backend).grad_fn is None
        linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=10**6)
    ran = {key: count - before.get(key, 0) for key, count in dispatch.runs().items() if count != before.get(key, 0)}
    assert ran == {(backend, "exact"): 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 140, 2**40, -(2**40)])
def test_bad_labels_give_nan_on_their_row(backend, bad):
    hidden, weight, labels, _ = problem(20, 24, 140)
    good = linear_logps(hidden, weight, labels, backend=backend)
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"labels\[2\] = {bad}.*140 tokens"):
        linear_logps(hidden, weight, labels, backend=backend, validate=True)
    found, entropy = linear_logps(hidden, weight, labels, backend=backend, validate=False, return_entropy=True)
    assert found[2].isnan() and entropy[2].isnan()
    kept = torch.arange(20) != 2
    torch.testing.assert_close(found[kept], good[kept])
    found.sum().backward()
    assert hidden.grad[2].isnan().all() and not hidden.grad[kept].isnan().any()
    frozen = hidden.detach().requires_grad_()
    linear_logps(frozen, weight.detach(), labels, backend=backend, validate=False).sum().backward()
    assert frozen.grad[2].isnan().all() and not frozen.grad[kept].isnan().any()


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [1, 3, 5], [0, 3, 6], [0, -4, 5], [0, 9, 5]])
def test_bad_offsets_give_nan(offsets):
    hidden, weight, labels, _ = problem(5, 24, 140)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend="fused", validate=False)
    assert stats.logp_sum.isnan().all() and stats.prob_mean.isnan().all() and stats.prob_std.isnan().all()
    assert (stats.length == 1).all()
    stats.logp_sum.sum().backward()
    assert hidden.grad.isnan().all()


def test_probability_statistics_of_long_and_certain_sequences():
    """Two passes: sum p^2 - n mean^2 is 0 or negative in float32 where every p is near 1."""
    from amopo_kernels.statistics.sequence_sums import sequence_sums

    torch.manual_seed(3)
    lengths = [1, 0, 1500, 2, 3000]
    logps = torch.cat([-torch.rand(1) * 9, -1e-4 * torch.rand(1500), -torch.rand(2), -9 * torch.rand(3000)]).to(DEVICE)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    found = sequence_sums(logps, cu_seqlens)
    expected = reference.sequence_stats(logps.double(), cu_seqlens)
    # A float32 probability near 1 is known to 6e-8: relative to a deviation of 3e-5 that is 2e-3.
    for a, b, tolerance in zip(found, expected, (1e-6, 0, 1e-6, 2e-3), strict=False):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=0)


def test_autocast_rounds_the_operands_and_nothing_else():
    hidden, weight, labels, bias = problem(21, 24, 150, bias=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_logps(hidden, weight, labels, bias, backend="fused")
    found.sum().backward()
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    logps, exact = exact_gradients(
        rounded[0].requires_grad_(), rounded[1].requires_grad_(), labels, torch.ones(21, device=DEVICE), bias
    )
    torch.testing.assert_close(found.double(), logps, rtol=1e-5, atol=1e-5)
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        assert a.grad.dtype == torch.float32 and relative_error(a.grad, b) < 3e-3


def test_unsupported_requests_are_named():
    hidden, weight, labels, _ = problem(5, 24, 140, torch.float64)
    with pytest.raises(UnsupportedError, match="'fused'.*float64"):
        linear_logps(hidden, weight, labels, backend="fused")

"""linear_logps of the torch backend against the float64 oracle."""

import weakref

import head_cases
import pytest
import torch
from head_cases import in_float64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amopo_kernels import BackendUnavailableError, DoubleBackwardError, linear_logps, reference
from amopo_kernels.head import torch_slices
from amopo_kernels.head.torch_slices import SLICE_COLUMNS

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def problem(*sizes, bias=True, **options):
    return head_cases.problem(*sizes, bias=bias, device="cpu", **options)


def compare(hidden, weight, labels, bias, tolerance, entropy=False, **options):
    """Values, and the gradients of a random combination of every token's log-probability (and entropy)."""
    exact = in_float64(hidden, weight, bias)
    found = linear_logps(hidden, weight, labels, bias, return_entropy=entropy, **options)
    expected = reference.linear_logps(exact[0], exact[1], labels, exact[2], return_entropy=entropy, **options)
    found, expected = (x if entropy else (x,) for x in (found, expected))
    upstream = [torch.randn(x.shape, dtype=torch.float64) for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.promote_types(hidden.dtype, torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (1 + b.abs().max().item()))
    torch.autograd.backward(found, [u.to(a.dtype) for u, a in zip(upstream, found, strict=True)])
    torch.autograd.backward(expected, upstream)
    for name, a, b in zip(("hidden", "weight", "bias"), (hidden, weight, bias), exact, strict=True):
        if a is not None and a.requires_grad:
            assert a.grad.dtype == a.dtype
            assert relative_error(a.grad, b.grad) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap, temperature, bias", [(None, 1.0, False), (None, 0.7, True), (5.0, 1.3, True)])
def test_against_reference(dtype, entropy, softcap, temperature, bias):
    hidden, weight, labels, offset = problem(37, 24, 5003, dtype, scale=3, bias=bias)
    labels[[0, 9]], labels[[3, 20]] = 5002, -100
    compare(hidden, weight, labels, offset, TOLERANCE[dtype], entropy, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("vocabulary", [1, 2, *(SLICE_COLUMNS + n for n in (-1, 0, 1)), 2 * SLICE_COLUMNS + 1])
def test_vocabulary_around_a_slice(vocabulary):
    hidden, weight, labels, bias = problem(9, 8, vocabulary, torch.float64)
    exact = in_float64(hidden, weight, bias)
    found, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True)
    expected, exact_entropy = reference.linear_logps(*exact[:2], labels, exact[2], return_entropy=True)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entropy, exact_entropy, rtol=1e-11, atol=1e-12)
    (found * entropy + found).sum().backward()
    (expected * exact_entropy + expected).sum().backward()
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sixteen_bit_inputs(dtype, rounding):
    hidden, weight, labels, bias = problem(33, 16, 5003, dtype)
    exact = in_float64(hidden, weight, bias)
    found = linear_logps(hidden, weight, labels, bias)
    expected = reference.linear_logps(*exact[:2], labels, exact[2])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(33)
    found.backward(upstream)
    expected.backward(upstream.double())
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        assert a.grad.dtype == dtype
        assert relative_error(a.grad, b.grad) < rounding


def test_autocast_rounds_the_operands_and_nothing_else():
    hidden, weight, labels, bias = problem(21, 16, 2500)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logps(hidden, weight, labels, bias)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    offset = bias.detach().double().requires_grad_()
    expected = reference.linear_logps(*rounded, labels, offset)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for a, b in zip((hidden, weight, bias), (*rounded, offset), strict=True):
        assert a.grad.dtype == torch.float32
        assert relative_error(a.grad, b.grad) < 1e-2


def test_backward_inside_autocast_equals_backward_outside():
    gradients = []
    for inside in (False, True):
        hidden, weight, labels, bias = problem(21, 16, 2500)
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_logps(hidden, weight, labels, bias).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    for outside, inside in zip(*gradients, strict=True):
        assert torch.equal(outside, inside)


@pytest.mark.parametrize("shift", [0.0, -60.0, 60.0])
def test_large_and_strongly_negative_logits(shift):
    hidden, weight, labels, bias = problem(24, 16, 3001, scale=12)
    with torch.no_grad():
        bias += shift
    assert (hidden @ weight.T).abs().max() > 40
    compare(hidden, weight, labels, bias, 2e-5, entropy=True)


@pytest.mark.parametrize("confidence", [12.0, 20.0, 40.0])
def test_gradient_where_the_label_is_almost_certain(confidence):
    """1 - p_y is all of the gradient, and p_y itself rounds to 1."""
    torch.manual_seed(1)
    vocabulary, labels = 2500, torch.tensor([3, 2049, 2499])
    hidden = torch.eye(3, 8).requires_grad_()
    weight = 0.1 * torch.randn(vocabulary, 8)
    weight[labels, torch.arange(3)] = confidence + 9  # log(2500) = 7.8
    weight.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = linear_logps(hidden, weight, labels)
    logits = exact[0] @ exact[1].T
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    expected = -torch.nn.functional.softplus(others - logits.gather(1, labels[:, None])[:, 0], threshold=1e9)
    assert expected.exp().min() > 0.9999
    logps.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=2e-5, atol=0)
    for a, b in zip((hidden, weight), exact, strict=True):
        assert relative_error(a.grad, b.grad) < 2e-5
    torch.testing.assert_close(weight.grad[labels].double(), exact[1].grad[labels], rtol=2e-5, atol=1e-25)


def test_no_rows():
    hidden, weight, labels, bias = problem(0, 6, 2100, torch.float64)
    logps, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == entropy.shape == (0,) and hidden.grad.shape == (0, 6)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("entropy", [False, True])
def test_one_row(entropy):
    compare(*problem(1, 6, 2100, torch.float64), 1e-11, entropy)


def test_leading_shapes_and_int32_labels():
    hidden, weight, labels, bias = problem(12, 6, 50, torch.float64)
    flat = linear_logps(hidden, weight, labels, bias)
    shaped = linear_logps(hidden.view(2, 3, 2, 6), weight, labels.view(2, 3, 2).int(), bias)
    assert torch.equal(shaped, flat.view(2, 3, 2))
    torch.testing.assert_close(linear_logps(hidden[0], weight, labels[0], bias), flat[0], rtol=1e-12, atol=0)


def test_non_contiguous_inputs():
    torch.manual_seed(2)
    hidden = torch.randn(10, 26, dtype=torch.float64).T[::2].requires_grad_()
    weight = torch.randn(10, 2100, dtype=torch.float64).T.requires_grad_()
    bias = torch.randn(4200, dtype=torch.float64)[::2].requires_grad_()
    labels = torch.randint(0, 2100, (26,))[::2]
    for x in (hidden, weight, bias):
        x.retain_grad()
    assert not any(x.is_contiguous() for x in (hidden, weight, bias, labels))
    compare(hidden, weight, labels, bias, 1e-11)


@pytest.mark.parametrize("needed", range(1, 8))
@pytest.mark.parametrize("entropy", [False, True])
def test_every_subset_of_gradients(needed, entropy):
    hidden, weight, labels, bias = problem(11, 6, 2300, torch.float64)
    for bit, x in enumerate((hidden, weight, bias)):
        x.requires_grad_(bool(needed >> bit & 1))
    compare(hidden, weight, labels, bias, 1e-10, entropy)
    for bit, x in enumerate((hidden, weight, bias)):
        assert (x.grad is not None) == bool(needed >> bit & 1)


def test_nothing_is_stored_without_gradients():
    hidden, weight, labels, bias = problem(5, 6, 40)
    with torch.no_grad():
        assert linear_logps(hidden, weight, labels, bias).grad_fn is None
    assert not linear_logps(hidden.detach(), weight.detach(), labels, bias.detach()).requires_grad


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(softcap, entropy):
    hidden, weight, labels, bias = problem(4, 3, 7, torch.float64)
    labels[1] = -100

    def function(h, w, b):
        return linear_logps(h, w, labels, b, softcap=softcap, temperature=0.8, return_entropy=entropy)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 9),
    vocabulary=st.sampled_from([1, 2, 3, 17, SLICE_COLUMNS, SLICE_COLUMNS + 3]),
    softcap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([0.5, 1.0]),
    ignored=st.integers(0, 9),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, features, vocabulary, softcap, temperature, ignored, bias, seed):
    hidden, weight, labels, offset = problem(rows, features, vocabulary, torch.float64, seed=seed, bias=bias)
    labels[:ignored] = -7
    exact = in_float64(hidden, weight, offset)
    options = {"softcap": softcap, "temperature": temperature, "ignore_index": -7}
    found = linear_logps(hidden, weight, labels, offset, **options)
    expected = reference.linear_logps(*exact[:2], labels, exact[2], **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    upstream = torch.randn(rows, dtype=torch.float64)
    found.backward(upstream)
    expected.backward(upstream)
    for a, b in zip((hidden, weight, offset), exact, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_ignored_rows_give_zero_and_no_gradient():
    hidden, weight, labels, bias = problem(8, 6, 2100)
    labels[[1, 4]] = -100
    logps, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    ignored = labels == -100
    assert not logps[ignored].any() and not entropy[ignored].any() and not hidden.grad[ignored].any()
    assert (logps[~ignored] < 0).all() and hidden.grad[~ignored].any(1).all()


def test_same_bits_twice():
    results = []
    for _ in range(2):
        hidden, weight, labels, bias = problem(65, 16, 5003)
        logps, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True)
        (logps + 0.1 * entropy).sum().backward()
        results.append((logps, entropy, hidden.grad, weight.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_double_backward_is_refused_and_retain_graph_works():
    hidden, weight, labels, bias = problem(5, 6, 40)
    logps = linear_logps(hidden, weight, labels, bias)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(gradient.sum(), weight)
    logps = linear_logps(hidden, weight, labels, bias)
    first = torch.autograd.grad(logps.sum(), (hidden, weight, bias), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [-1, 40, 2**40, -(2**40)])
def test_bad_labels(bad):
    hidden, weight, labels, bias = problem(5, 6, 40)
    good = linear_logps(hidden, weight, labels, bias)
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"labels\[2\] = {bad}.*40 tokens"):
        linear_logps(hidden, weight, labels, bias)
    found, entropy = linear_logps(hidden, weight, labels, bias, validate=False, return_entropy=True)
    assert found[2].isnan() and entropy[2].isnan()
    kept = torch.arange(5) != 2
    torch.testing.assert_close(found[kept], good[kept])
    found.sum().backward()
    assert hidden.grad[2].isnan().all() and not hidden.grad[kept].isnan().any()


def test_bad_arguments_are_refused():
    hidden, weight, labels, bias = problem(5, 6, 40)
    for arguments in [
        (hidden[:, :5], weight, labels, bias),
        (hidden, weight, labels[:4], bias),
        (hidden, weight, labels, bias[:7]),
        (hidden, weight[:0], labels, None),
        (hidden, weight[0], labels, None),
    ]:
        with pytest.raises(ValueError):
            linear_logps(*arguments)
    for options in ({"temperature": 0.0}, {"softcap": -1.0}, {"backend": "cuda"}):
        with pytest.raises(ValueError):
            linear_logps(hidden, weight, labels, bias, **options)
    with pytest.raises(TypeError):
        linear_logps(hidden, weight, labels.float(), bias)
    with pytest.raises(TypeError):
        linear_logps(hidden.long(), weight, labels, bias)
    with pytest.raises(BackendUnavailableError, match="meta"):
        linear_logps(*(x.to("meta") for x in (hidden, weight, labels)), backend="fused")


class LiveStorages(TorchDispatchMode):
    """The largest number of bytes alive at once in storages that operations made under this mode."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes, self.peak = weakref.WeakKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in before and storage not in self.live:
                    self.live[storage] = size = storage.nbytes()
                    self.bytes += size
                    weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, size):
        self.bytes -= size


def watched(function, tracker):
    """A dispatch mode does not see what runs inside of an operator, so it is entered there."""

    def run(*args, **kwargs):
        with tracker:
            return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("entropy", [False, True])
def test_memory_stays_under_a_tenth_of_the_logits(entropy, monkeypatch):
    rows, features, vocabulary = 512, 64, 100003
    hidden, weight = torch.randn(rows, features), torch.randn(vocabulary, features).mul_(features**-0.5)
    labels = torch.randint(0, vocabulary, (rows,))
    hidden.requires_grad_(), weight.requires_grad_()
    tracker = LiveStorages()
    for name in ("forward", "backward"):
        monkeypatch.setattr(torch_slices, name, watched(getattr(torch_slices, name), tracker))
    found = linear_logps(hidden, weight, labels, return_entropy=entropy)
    (sum(x.sum() for x in found) if entropy else found.sum()).backward()
    assert tracker.peak > rows * SLICE_COLUMNS * 4 + hidden.nbytes + weight.nbytes  # a slice and gradients are seen
    # What the forward keeps lies in the memory of the gradient of weight.
    assert tracker.peak - hidden.nbytes - weight.nbytes < rows * vocabulary * 4 / 10

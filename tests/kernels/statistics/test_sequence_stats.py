"""sequence_stats and linear_sequence_stats against the float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_kernels import DoubleBackwardError, UnsupportedError, linear_sequence_stats, reference, sequence_stats


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def compare(found, expected, rtol, atol):
    for name in ("logp_sum", "prob_mean", "prob_std", "logps"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert found.length.dtype == torch.int32
    assert torch.equal(found.length, expected.length)
    assert not any(x.requires_grad for x in (found.prob_mean, found.prob_std, found.logps))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), max_size=9), seed=st.integers(0, 1000))
def test_any_lengths(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    logps.requires_grad_()
    exact = logps.detach().clone().requires_grad_()
    found, expected = (f(x, offsets_of(lengths)) for f, x in
                       ((sequence_stats, logps), (reference.sequence_stats, exact)))  # fmt: skip
    compare(found, expected, 1e-12, 1e-12)
    upstream = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    if sum(lengths):
        found.logp_sum.backward(upstream)
        assert torch.equal(logps.grad, upstream.repeat_interleave(torch.tensor(lengths)))


@pytest.mark.parametrize("dtype, result", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_result_dtype(dtype, result):
    logps = (-torch.rand(6)).to(dtype).requires_grad_()
    stats = sequence_stats(logps, offsets_of([2, 0, 4]))
    assert {stats.logp_sum.dtype, stats.prob_mean.dtype, stats.prob_std.dtype} == {result}
    expected = reference.sequence_stats(logps.detach().double(), offsets_of([2, 0, 4]))
    compare(stats, expected, 1e-6, 1e-6)


def test_deviation_of_probabilities_near_one():
    """sum p^2 - n mean^2 would be rounding noise here."""
    deviation = torch.rand(500, dtype=torch.float64) * 1e-4
    logps = torch.log1p(-deviation).float()
    stats = sequence_stats(logps, offsets_of([500]))
    torch.testing.assert_close(stats.prob_std[0].double(), logps.double().exp().std(), rtol=1e-6, atol=0)


def problem(lengths, dtype=torch.float64, features=6, vocabulary=2300):
    rows = sum(lengths)
    hidden = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, features, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,)), offsets_of(lengths), bias


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_linear_against_reference(dtype, tolerance):
    hidden, weight, labels, cu_seqlens, bias = problem([3, 1, 0, 0, 5, 2], dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    options = {"softcap": 4.0, "temperature": 0.7}
    found = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, **options)
    expected = reference.linear_sequence_stats(*exact[:2], labels, cu_seqlens, exact[2], **options)
    compare(found, expected, tolerance, tolerance)
    upstream = torch.randn(6, dtype=torch.float64)
    found.logp_sum.backward(upstream.to(dtype))
    expected.logp_sum.backward(upstream)
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        assert (a.grad.double() - b.grad).norm() < tolerance * b.grad.norm()


def test_linear_gradcheck():
    hidden, weight, labels, cu_seqlens, bias = problem([2, 0, 1], vocabulary=5)

    def function(h, w, b):
        return linear_sequence_stats(h, w, labels, cu_seqlens, b).logp_sum

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("lengths", [[0, 0], []])
def test_no_rows(lengths):
    hidden, weight, labels, cu_seqlens, bias = problem(lengths)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias)
    assert stats.logp_sum.tolist() == [0.0] * len(lengths)
    stats.logp_sum.sum().backward()
    assert not weight.grad.any() and hidden.grad.shape == (0, 6)


def test_double_backward_retain_graph_and_same_bits():
    hidden, weight, labels, cu_seqlens, bias = problem([3, 2], torch.float32)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias)
    again = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))
    first = torch.autograd.grad(stats.logp_sum.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(stats.logp_sum.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(again.logp_sum.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    "bad", [[0, 3, 2, 5], [1, 2, 3, 5], [0, 2, 3, 4], [0, 2, 3, 2**30], [0, -(2**30), 3, 5], [0] * 4]
)
def test_bad_offsets(bad):
    hidden, weight, labels, _, bias = problem([5])
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    for call in (
        lambda: linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias),
        lambda: sequence_stats(-torch.rand(5), cu_seqlens),
    ):
        with pytest.raises(ValueError, match="cu_seqlens"):
            call()
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, validate=False)
    assert all(x.isnan().all() for x in (stats.logp_sum, stats.prob_mean, stats.prob_std))
    assert (stats.length > 0).all()  # an absent dimension would hide the NaN from the loss


def test_bad_offsets_without_rows():
    hidden, weight, labels, _, bias = problem([0])
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, validate=False)
    assert stats.logp_sum.isnan().all()


@pytest.mark.parametrize("bad", [-100, -1, 2300])
def test_bad_labels(bad):
    hidden, weight, labels, cu_seqlens, bias = problem([3, 2])
    labels[1] = bad
    with pytest.raises(ValueError, match=r"labels\[1\]"):
        linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, validate=False)
    assert stats.logp_sum.isnan().tolist() == [True, False]
    assert stats.prob_mean.isnan().tolist() == [True, False]


def test_what_the_torch_backend_lacks_is_refused():
    arguments = problem([3, 2])
    with pytest.raises(UnsupportedError, match="'torch'.*logits_cache_bytes; use chunked or fused"):
        linear_sequence_stats(*arguments, logits_cache_bytes=1)

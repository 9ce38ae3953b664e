"""What the torch backend keeps on a CPU in the memory of the gradient of weight: no logit twice, the same results."""

from unittest import mock

import pytest
import torch
from head_cases import exact_gradients, in_float64, once_rounded, problem, relative_error
from torch.autograd.graph import saved_tensors_hooks

from amopo_kernels import linear_logps, reference
from amopo_kernels.head import torch_slices

VOCABULARY = 2 * torch_slices.SLICE_COLUMNS + 500  # 3 slices


def make(rows, features, dtype=torch.float32, **options):
    hidden, weight, labels, bias = problem(rows, features, VOCABULARY, dtype, scale=3, bias=True, device="cpu")
    labels[1], labels[2] = VOCABULARY - 1, -100
    upstream = torch.randn(rows, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return (hidden, weight, bias), labels, upstream, linear_logps(hidden, weight, labels, bias, **options)


def errors(found, tensors, labels, upstream):
    upstream = upstream.masked_fill(labels == -100, 0)
    _, exact = exact_gradients(*tensors[:2], labels, upstream, tensors[2])
    return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("rows, features, again", [(9, 24, 0), (24, 24, 0), (28, 24, 1), (50, 24, 2), (200, 24, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_slices_that_fit_are_not_computed_again(rows, features, again, dtype, tolerance):
    tensors, labels, upstream, logps = make(rows, features, dtype)
    with mock.patch.object(torch_slices, "_logits", wraps=torch_slices._logits) as computed:
        logps.backward(upstream)
    assert computed.call_count == again
    assert max(errors([x.grad for x in tensors], tensors, labels, upstream)) < tolerance


@pytest.mark.parametrize("outputs", [("entropy",), ("lse", "mean_logit"), ("entropy", "top1", "log_sum_p2")])
def test_other_outputs_are_kept_too(outputs):
    """The same numbers as with a softcap so wide that it changes nothing, with which nothing is kept."""
    gradients = []
    for softcap in (None, 1e6):
        tensors, _, upstream, (logps, *others) = make(9, 24, torch.float64, outputs=outputs, softcap=softcap)
        total = (logps * upstream).sum() + sum((x * upstream).sum() for x in others if x.requires_grad)
        with mock.patch.object(torch_slices, "_logits", wraps=torch_slices._logits) as computed:
            gradients.append(torch.autograd.grad(total, tensors))
        assert computed.call_count == (3 if softcap else 0)
    assert all(relative_error(a, b) < 1e-8 for a, b in zip(*gradients, strict=True))


def test_the_gradient_lies_where_the_scores_were():
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        (_, weight, _), _, upstream, logps = make(9, 24)
    logps.backward(upstream)
    (kept,) = [x for x in saved if x.numel() == weight.numel() + 1]
    assert weight.grad.data_ptr() == kept.data_ptr() and weight.grad.is_contiguous()


@pytest.mark.parametrize("rows", [9, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"outputs": ("entropy",)}, {"temperature": 0.7}])
def test_a_second_backward_has_the_same_bits_and_leaves_the_first_gradient(rows, dtype, options):
    tensors, labels, upstream, logps = make(rows, 24, dtype, **options)
    logps = logps if torch.is_tensor(logps) else logps[0]
    first = torch.autograd.grad(logps, tensors, upstream.float(), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(logps, tensors, upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if dtype == torch.float32 and "temperature" not in options:
        assert max(errors(first, tensors, labels, upstream)) < 3e-6


@pytest.mark.parametrize("rows", [9, 50])
def test_a_temperature_of_each_row(rows):
    temperature = torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.5
    for outputs in ((), ("entropy",)):
        tensors, labels, upstream, found = make(rows, 24, temperature=temperature, outputs=outputs)
        exact = in_float64(*tensors)
        expected = reference.linear_logps(
            *exact[:2], labels, exact[2], temperature=temperature.double(), outputs=outputs
        )
        found, expected = (x if outputs else (x,) for x in (found, expected))
        for results, inputs in ((found, tensors), (expected, exact)):
            sum((x * upstream.to(x.dtype)).sum() for x in results).backward(inputs=inputs)
        assert max(relative_error(a.grad, b.grad) for a, b in zip(tensors, exact, strict=True)) < 3e-6


@pytest.mark.parametrize("copied", [lambda x: x.numel() > 10**4, lambda x: x.numel() <= 10**4, lambda x: True])
def test_hooks_that_save_some_tensors_elsewhere(copied):
    with saved_tensors_hooks(lambda x: x.clone() if copied(x) else x, lambda x: x.clone() if copied(x) else x):
        tensors, labels, upstream, logps = make(9, 24)
    for _ in range(2):
        found = torch.autograd.grad(logps, tensors, upstream, retain_graph=True)
        assert max(errors(found, tensors, labels, upstream)) < 3e-6


def test_a_frozen_weight_and_no_gradient_keep_nothing():
    hidden, weight, labels, _ = problem(9, 24, VOCABULARY, device="cpu")
    for tensors in ((hidden, weight.detach()), (hidden.detach(), weight.detach())):
        saved = []
        with saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            linear_logps(*tensors, labels)
        assert not any(x.numel() > weight.numel() for x in saved)


@pytest.mark.parametrize("rows", [40, 64, 130])
def test_no_product_is_written_over_what_it_reads(rows, monkeypatch):
    """Which a CPU may bear, and an Intel Xeon with AMX does not: dW was wrong there."""
    features, written = 64, []

    def mm(a, b, out=None):
        if out is not None:
            written.append(out)
            assert not {x.untyped_storage().data_ptr() for x in (a, b)} & {out.untyped_storage().data_ptr()}
        return product(a, b) if out is None else product(a, b, out=out)

    product = torch.mm
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch_slices, "_native_bfloat16", lambda problem, d_weight: True)
    hidden, weight, labels, _ = problem(rows, features, VOCABULARY, torch.bfloat16, device="cpu")
    linear_logps(hidden, weight, labels).sum().backward()
    assert written


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("rows, features", [(40, 64), (64, 64), (130, 64)])
@pytest.mark.parametrize("scale, common", [(1.5, 0.0), (12, 0.0), (1.5, 4.0)], ids=["flat", "sharp", "common mean"])
def test_bfloat16_is_rounded_little_more_than_once(rows, features, scale, common):
    """With a direction that all tokens have in common the parts of dX are large and their sum is small."""
    hidden, weight, labels, _ = problem(rows, features, VOCABULARY, torch.bfloat16, scale=scale, device="cpu")
    with torch.no_grad():
        weight += common / features**0.5
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    logps = linear_logps(hidden, weight, labels)
    with mock.patch.object(torch_slices, "_logits", wraps=torch_slices._logits) as computed:
        logps.backward(upstream)
    assert computed.call_count == (0 if rows <= features else 2)
    expected, exact = exact_gradients(hidden, weight, labels, upstream)
    largest = (hidden.double() @ weight.double().T).abs().max()
    assert (logps.double() - expected).abs().max() <= 1e-5 * (1 + largest)
    once = once_rounded(hidden, weight, labels, upstream)
    for found, rounded, wanted in zip((hidden.grad, weight.grad), once, exact, strict=False):
        assert relative_error(found, wanted) <= 1.5 * relative_error(rounded, wanted)


def test_the_scores_of_an_entropy_are_not_kept_in_bfloat16():
    hidden, weight, labels, _ = problem(9, 24, VOCABULARY, torch.bfloat16, device="cpu")
    total = sum(x.sum() for x in linear_logps(hidden, weight, labels, return_entropy=True))
    with mock.patch.object(torch_slices, "_logits", wraps=torch_slices._logits) as computed:
        total.backward()
    assert computed.call_count == 3

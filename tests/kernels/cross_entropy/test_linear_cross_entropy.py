"""linear_cross_entropy against torch's own and the oracle, on every backend."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from head_cases import ALL_BACKENDS, DEVICE, in_float64, problem, relative_error

from amopo_kernels import linear_cross_entropy, linear_logps, reference

pytest.importorskip("triton")
REDUCTIONS = ("mean", "sum", "none")


def case(dtype=torch.float32, weights=False):
    hidden, weight, labels, bias = problem(23, 16, 150, dtype, scale=2, bias=True)
    labels[[2, 9, 10]] = -100
    classes = torch.rand(150, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.2
    return hidden, weight, labels, bias, classes.to(DEVICE, dtype) if weights else None


def compare(found, expected, tensors, exact, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(found.shape, dtype=torch.float64, device=DEVICE)
    found.backward(upstream.to(found.dtype)), expected.backward(upstream)
    for a, b in zip(tensors, exact, strict=True):
        assert relative_error(a.grad, b.grad) < 3 * tolerance


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_torchs_own_function(reduction, weights, smoothing):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    hidden, weight, labels, bias, classes = case(torch.float64, weights)
    options = {"weight": classes, "reduction": reduction, "label_smoothing": smoothing}
    exact = in_float64(hidden, weight, bias)
    found = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, backend="torch", **options)
    expected = F.linear_cross_entropy(exact[0], exact[1], labels, linear_bias=exact[2], **options)
    compare(found, expected, (hidden, weight, bias), exact, 1e-6 if weights and smoothing else 1e-11)
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    ours = inspect.signature(linear_cross_entropy).parameters
    assert [name for name in ours if name in theirs] == [name for name in theirs if name != "options"]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("reduction, weights, smoothing, z_loss", [
    ("mean", True, 0.1, 0.0), ("mean", False, 0.1, 1e-2), ("sum", True, 0.3, 1e-3), ("none", True, 0.1, 1e-2),
    ("mean", True, 0.0, 1e-2),
])  # fmt: skip
def test_everything_at_once(backend, reduction, weights, smoothing, z_loss):
    hidden, weight, labels, bias, classes = case(weights=weights)
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": 9.0,
               "temperature": 0.8}  # fmt: skip
    exact = in_float64(hidden, weight, bias)
    found = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, weight=classes, backend=backend, **options)
    classes = None if classes is None else classes.double()
    expected = reference.linear_cross_entropy(*exact[:2], labels, linear_bias=exact[2], weight=classes, **options)
    compare(found, expected, (hidden, weight, bias), exact, 2e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shifted_rows_and_a_temperature_of_each(reduction):
    hidden, weight, labels, bias, _ = case(torch.float64)
    hidden, labels = hidden.detach()[:20].view(2, 10, 16).requires_grad_(), labels[:20].view(2, 10)
    exact = in_float64(hidden, weight, bias)
    found = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, shift=True, reduction=reduction)
    expected = reference.linear_cross_entropy(*exact[:2], labels, linear_bias=exact[2], shift=True,
                                              reduction=reduction)  # fmt: skip
    assert found.shape == ((2, 9) if reduction == "none" else ())
    compare(found, expected, (hidden, weight, bias), exact, 1e-11)
    temperature = torch.rand(2, 10, device=DEVICE, dtype=torch.float64) + 0.5
    by_row = linear_cross_entropy(hidden, weight, labels, shift=True, reduction="none", temperature=temperature)
    logps = linear_logps(hidden[:, :-1], weight, labels[:, 1:], temperature=temperature[:, :-1])
    assert torch.equal(by_row, -logps)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_parts_of_the_loss_and_outputs_of_the_head(backend):
    hidden, weight, labels, bias, _ = case()
    scored = labels != -100
    with torch.no_grad():
        labels[5] = F.linear(hidden, weight, bias)[5].argmax()
    options = {"linear_bias": bias, "backend": backend, "z_loss": 1e-2}
    loss, accuracy, z_loss, lse, top1 = linear_cross_entropy(
        hidden, weight, labels, outputs=("accuracy", "z_loss", "lse", "top1"), **options
    )
    logits = F.linear(hidden, weight, bias).detach()
    expected = (logits.argmax(1) == labels)[scored].float().mean()
    torch.testing.assert_close(accuracy, expected)
    assert 0 < accuracy < 1
    torch.testing.assert_close(z_loss, 1e-2 * logits.logsumexp(1)[scored].square().mean())
    torch.testing.assert_close(loss - z_loss, F.cross_entropy(logits, labels))
    torch.testing.assert_close(lse, logits.logsumexp(1).masked_fill(~scored, 0))
    assert torch.equal(top1, logits.argmax(1).masked_fill(~scored, 0))
    rows = linear_cross_entropy(hidden, weight, labels, outputs=("accuracy",), reduction="none", **options)[1]
    torch.testing.assert_close(rows.sum() / scored.sum(), accuracy)


def test_another_index_is_ignored_and_no_row_is_nan_as_torchs():
    hidden, weight, labels, _, _ = case()
    labels[labels == -100] = 7
    found = linear_cross_entropy(hidden, weight, labels, ignore_index=7)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=7))
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_bad_arguments_are_refused():
    hidden, weight, labels, _, classes = case(weights=True)
    for options, error, message in [
        ({"reduction": "avg"}, ValueError, "reduction='avg'; choose one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be finite"),
        ({"outputs": ("logits",)}, ValueError, "outputs has 'logits'; choose among z_loss, accuracy, entropy"),
        ({"weight": classes[:9]}, ValueError, r"weight must be \(150,\), got \(9,\)"),
        ({"weight": classes, "label_smoothing": 0.1, "outputs": ("mean_logit",)}, ValueError, "need for themselves"),
    ]:
        with pytest.raises(error, match=message):
            linear_cross_entropy(hidden, weight, labels, **options)
    with pytest.raises(TypeError, match="target has class probabilities"):
        linear_cross_entropy(hidden, weight, torch.rand(23, 150, device=DEVICE))


def test_the_table_of_features_names_arguments_that_are_there():
    page = (Path(__file__).parents[3] / "docs/kernels.md").read_text()
    [table] = re.findall(r"^\| feature \| ours .*?\n\n", page, re.MULTILINE | re.DOTALL)
    parameters = {*inspect.signature(linear_cross_entropy).parameters, *inspect.signature(linear_logps).parameters}
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.strip().splitlines()[2:]]
    named = {name for row in rows for name in re.findall(r"`(\w+)=", row[1])}
    assert len(rows) > 15 and named <= parameters and len(named) > 8
    if hasattr(F, "linear_cross_entropy"):
        theirs = inspect.signature(F.linear_cross_entropy).parameters
        for row in rows:
            assert all(name in theirs for name in re.findall(r"`(\w+)=", row[-1])), row

"""Gradients of every output made of probabilities that the forward kept, against those that are recomputed."""

import pytest
import torch
from head_cases import BACKENDS, DEVICE, in_float64, problem, relative_error

from amopo_kernels import linear_logps, reference
from amopo_kernels.head import kept_probabilities

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
OUTPUTS = ("entropy", "lse", "mean_logit")


def gradients(tensors, labels, function, upstream, **options):
    found = function(tensors[0], tensors[1], labels, tensors[2], outputs=OUTPUTS, **options)
    total = sum((a.double() * u).sum() for a, u in zip(found, upstream, strict=True) if u is not None)
    return torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "softcap, wanted, reads",
    [(None, ("logps", *OUTPUTS), True), (None, ("entropy",), True), (6.0, ("logps", "lse"), True),
     (6.0, ("logps", *OUTPUTS), False), (6.0, ("mean_logit",), False)],
)  # fmt: skip
def test_kept_probabilities_serve_every_gradient(backend, softcap, wanted, reads, monkeypatch):
    read = []
    kept = kept_probabilities.cached_gradient
    monkeypatch.setattr(kept_probabilities, "cached_gradient", lambda *a: read.append(a) or kept(*a))
    hidden, weight, labels, bias = problem(23, 16, 201, scale=3, bias=True)
    labels[[2, 9]], labels[4], labels[5] = -100, 200, 0  # one of them in what is kept
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(23, generator=generator, dtype=torch.float64).to(DEVICE) if name in wanted else None
                for name in ("logps", *OUTPUTS)]  # fmt: skip
    options = {"softcap": softcap, "temperature": 0.8}
    found = gradients((hidden, weight, bias), labels, linear_logps, upstream, backend=backend,
                      logits_cache_bytes=23 * 128 * 4, **options)  # fmt: skip
    expected = gradients(in_float64(hidden, weight, bias), labels, reference.linear_logps, upstream, **options)
    assert bool(read) == reads
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 2e-5
    assert not found[0][labels == -100].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_the_entropys_gradient_loses_no_more_than_a_rounding(backend):
    """A kept probability is rounded before dS is: 1.41 times the error of once on average, and its logarithm's."""
    hidden, weight, labels, _ = problem(40, 32, 300, torch.bfloat16, scale=4)
    errors = []
    for cache in (0, 40 * 512 * 2):
        logps, entropy = linear_logps(
            hidden, weight, labels, return_entropy=True, backend=backend, logits_cache_bytes=cache
        )
        found = torch.autograd.grad((logps.sum() + 3 * entropy.sum()), (hidden, weight))
        exact = in_float64(hidden, weight)
        logps, entropy = reference.linear_logps(*exact, labels, return_entropy=True)
        expected = torch.autograd.grad((logps.sum() + 3 * entropy.sum()), exact)
        errors.append([relative_error(a, b) for a, b in zip(found, expected, strict=True)])
    recomputed, kept = errors
    assert recomputed != kept
    assert all(a <= 1.6 * b for a, b in zip(kept, recomputed, strict=True))

"""Every mode of the bf16 head at a ragged size: accuracy, extreme logits, the same bits twice.

The first tests that a GPU machine runs (benchmarks/gpu_suite.py). A tiny shape is interpreted elsewhere.
"""

import pytest
import torch
from head_cases import BACKENDS, DEVICE, in_float64, once_rounded, problem, relative_error

from amopo_kernels import dispatch, linear_logps, linear_sequence_stats, reference

pytest.importorskip("triton")
# numpy, under the interpreter: a strip that holds nothing but the label
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
SHAPES = [
    pytest.param(21, 40, 333, id="tiny"),
    pytest.param(
        1000, 1544, 50257, id="ragged",
        marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")],
    ),
]  # fmt: skip


def gradients(hidden, weight, labels, grad, mode, backend):
    """(logps, entropy or None, dX, dW or None) of one call."""
    rows = labels.shape[0]
    wanted = (hidden,) if mode == "frozen" else (hidden, weight)
    if mode == "entropy":
        logps, entropy = linear_logps(hidden, weight, labels, return_entropy=True, backend=backend)
        found = torch.autograd.grad((logps, entropy), wanted, (grad, grad / 3))
        return logps, entropy, *found
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=hidden.device)
    cache = rows * 25000 * 2 if mode == "cached" else 0  # of the ragged shape about half
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache)
    found = torch.autograd.grad(stats.logp_sum, wanted, grad)
    return stats.logps, None, *found, *([None] if mode == "frozen" else [])


@pytest.mark.parametrize("scale", [1.5, 12], ids=["moderate", "extreme"])
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen", "entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N, H, V", SHAPES)
def test_mode(N, H, V, backend, mode, scale):
    hidden, weight, labels, _ = problem(N, H, V, torch.bfloat16, scale=scale)
    labels[-1] = V - 1
    weight.requires_grad_(mode != "frozen")
    grad = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ran = "exact" if mode == "entropy" else mode
    before = dispatch.runs().get((backend, ran), 0)
    first, second = (gradients(hidden, weight, labels, grad, mode, backend) for _ in range(2))
    assert dispatch.runs()[backend, ran] == before + 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    logps, entropy, dx, dw = first

    exact = in_float64(hidden, weight.detach().requires_grad_())
    expected = reference.linear_logps(*exact, labels, return_entropy=mode == "entropy")
    largest = (exact[0] @ exact[1].T).abs().max().item()
    assert largest > (40 if scale > 10 else 3)
    if mode == "entropy":
        expected, wanted = expected
        torch.testing.assert_close(entropy.double(), wanted, rtol=1e-4, atol=1e-5)
        torch.autograd.backward((expected, wanted), (grad.double(), grad.double() / 3))
        limits = (1e-2, 1e-2)  # what the once-rounded reference has without the entropy's part, three times
    else:
        expected.backward(grad.double())
        once = once_rounded(hidden, weight, labels, grad)
        limits = [1.5 * relative_error(a, x.grad) for a, x in zip(once, exact, strict=False)]
    assert (logps.double() - expected).abs().max() <= 1e-5 * (1 + largest)
    assert relative_error(dx, exact[0].grad) <= limits[0]
    if dw is not None:
        assert relative_error(dw, exact[1].grad) <= limits[1]

"""Every entry of the support matrix: what it promises is computed and right, what it denies is refused by name."""

from pathlib import Path

import pytest
import torch

from amopo_kernels import UnsupportedError, dispatch, reference
from amopo_kernels.head.logps import label_logps
from amopo_kernels.head.options import choose_options

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"
OPTIONS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "outputs": {"outputs": ("entropy", "lse", "mean_logit", "top1", "log_sum_p2")},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CASES = [(backend, mode) for backend in ("torch", "chunked", "fused") for mode in dispatch.MODES]


def compute(backend, mode, dtype, *, bias=False, softcap=None, temperature=1.0, outputs=()):
    """(mode that ran, largest relative error of values and gradients)"""
    if backend != "torch":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    frozen = mode == "frozen"
    hidden = torch.randn(6, 16, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(70, 16, device=DEVICE).to(dtype).requires_grad_(not frozen)
    offset = torch.randn(70, device=DEVICE).to(dtype).requires_grad_(not frozen) if bias else None
    labels = torch.randint(0, 70, (6,), device=DEVICE)
    before = dispatch.runs()
    options = choose_options(
        hidden, weight, offset, softcap=softcap, temperature=temperature, ignore_index=-100, outputs=outputs,
        backend=backend, validate=None, cache_bytes=10**6 if mode == "cached" else 0,
    )  # fmt: skip
    found = label_logps(hidden, weight, labels, offset, temperature, options)
    found = [getattr(found, name) for name in ("logps", *outputs)]
    (ran,) = [key for key, count in dispatch.runs().items() if count != before.get(key, 0)]
    exact = [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight, offset)]
    expected = reference.linear_logps(
        *exact[:2], labels, exact[2], softcap=softcap, temperature=temperature, outputs=outputs
    )
    expected = expected if outputs else (expected,)
    sum(x.sum() for x in found if x.requires_grad).backward()
    sum(x.sum() for x in expected if x.requires_grad).backward()
    pairs = [*zip(found, expected, strict=True)]
    pairs += [(a.grad, b.grad) for a, b in zip((hidden, weight, offset), exact, strict=True) if a is not None and
              a.requires_grad]  # fmt: skip
    assert ran[0] == backend
    return ran[1], max(((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs)


@pytest.mark.parametrize("backend, mode", CASES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend, mode, option):
    support = dispatch.SUPPORT.get((backend, mode))
    if support is None:
        with pytest.raises(UnsupportedError, match=f"'{backend}'"):
            compute(backend, mode, torch.float32, **OPTIONS[option])
        return
    ran, error = compute(backend, mode, torch.float32, **OPTIONS[option])
    assert ran == support.mode
    assert error < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend, mode", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, mode, dtype):
    support = dispatch.SUPPORT.get((backend, mode))
    if support is None or dtype not in support.dtypes:
        with pytest.raises(UnsupportedError, match=f"'{backend}'"):
            compute(backend, mode, dtype)
        return
    ran, error = compute(backend, mode, dtype)
    assert ran == support.mode and error < TOLERANCE[dtype]


def test_page_shows_this_matrix():
    assert dispatch.support_matrix() in PAGE.read_text(), "paste what dispatch.support_matrix() returns"

"""Accuracy of the bf16 head at the sizes of real models, against the benchmarks' sliced float64 oracle.

Bounds: a log-probability is off by at most 1e-5 * (1 + largest |logit|); a gradient by at most 1.5 times what rounding
dS to bfloat16 once and the result to its dtype costs. Small shapes run in the interpreter, the others on a GPU.
"""

import sys
from pathlib import Path

import pytest
import torch

from amopo_kernels import linear_sequence_stats

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from head_problem import Case, Oracle, random_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy, under the interpreter: a strip that holds nothing but the label
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
SHAPES = [
    pytest.param(24, 48, 300, id="tiny"),
    pytest.param(4096, 896, 151936, id="0.5B head", marks=gpu),
    pytest.param(4096, 5120, 152064, id="32B head", marks=gpu),
    pytest.param(32768, 896, 151936, id="more than 2^31 logits", marks=gpu),
    pytest.param(8, 896, 151936, id="a row per sequence", marks=gpu),
    pytest.param(1000, 1500, 50257, id="ragged", marks=gpu),
]


def rounding_errors(inputs, oracle) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of (every sampled row of dX, dW) that rounding dS once, and the results, brings: relative norms."""
    dx, dw = oracle.gradients(inputs.gradient)
    x, w = (tensor.detach().double() for tensor in (inputs.hidden, inputs.weight))
    lse, g = oracle.lse, inputs.gradient.double()

    def ds(rows, columns):
        p = (x[rows] @ w[columns].T - lse[rows, None]).exp()
        label = inputs.labels[rows, None] == torch.arange(len(w), device=w.device)[columns]
        return ((label.double() - p) * g[rows, None]).bfloat16().double()

    rounded_dx = (ds(oracle.rows, slice(None)) @ w).bfloat16().double()
    everything = torch.arange(len(x), device=x.device)
    rounded_dw = (ds(everything, oracle.columns).T @ x).bfloat16().double()
    return relative(rounded_dx, dx), (rounded_dw - dw).norm() / dw.norm()


def relative(values, wanted):
    return (values.double() - wanted).norm(dim=1) / wanted.norm(dim=1)


@pytest.mark.parametrize("logits", ["normal", "zipf"])
@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("N, H, V", SHAPES)
def test_within_bounds(N, H, V, backend, logits):
    inputs = random_inputs(Case("x", N, H, V, torch.bfloat16, logits), DEVICE, seed=0)
    oracle = Oracle(inputs, samples=min(N, 32))
    dx_limit, dw_limit = rounding_errors(inputs, oracle)
    runs = []
    for _ in range(2):
        stats = linear_sequence_stats(inputs.hidden, inputs.weight, inputs.labels, inputs.cu_seqlens, backend=backend)
        gradients = torch.autograd.grad(stats.logp_sum, (inputs.hidden, inputs.weight), inputs.sequence_gradient)
        runs.append([stats.logps, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    logps, dx, dw = runs[0]
    wanted_dx, wanted_dw = oracle.gradients(inputs.gradient)
    assert (logps.double() - oracle.logps).abs().max() <= 1e-5 * (1 + oracle.largest_logit)
    errors = relative(dx[oracle.rows], wanted_dx)
    worst = (errors / dx_limit).argmax()
    assert errors[worst] <= 1.5 * dx_limit[worst], (oracle.rows[worst], errors, dx_limit)
    assert (dw[oracle.columns].double() - wanted_dw).norm() / wanted_dw.norm() <= 1.5 * dw_limit

"""The head's torch operators: opcheck, torch.compile without graph breaks, CUDA graphs; the rule of `auto`."""

import logging

import pytest
import torch
from torch.library import opcheck

from amopo_kernels import amopo_loss, dispatch, linear_logps, linear_sequence_stats

pytest.importorskip("triton")
from amopo_kernels.head import operators  # noqa: E402  (needs Triton)
from amopo_kernels.head.options import Options  # noqa: E402
from amopo_kernels.statistics import sequence_sums  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCABULARY, FEATURES = 14, 140, 24
ALL = "entropy,lse,mean_logit,top1,log_sum_p2"


def problem(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, FEATURES, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator).to(DEVICE)
    return hidden, weight, bias, labels, torch.tensor([0, 4, 9, 9, 14], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("mode, outputs", [("exact", ""), ("exact", ALL), ("cached", ""), ("frozen", ALL)])
def test_opcheck(backend, mode, outputs):
    hidden, weight, bias, labels, _ = problem()
    if mode == "frozen":
        weight, bias = weight.detach(), bias.detach()
    options = Options(5.0, 1.3, -100, outputs, torch.float32, backend, mode, ROWS * 128 * 4, False, False)
    tensors = [x.detach() for x in (hidden, weight, bias)]  # function.py differentiates
    found = operators.Outputs(*operators.linear_logps(*tensors, labels, None, None, *options.flat()))
    opcheck(operators.linear_logps, (*tensors, labels, None, None, *options.flat()))
    if mode != "frozen":
        kept = [getattr(found, name) for name in operators.Kept._fields]
        grads = [torch.ones(ROWS, device=DEVICE) if name == "logps" or name in outputs else None for name in
                 operators.Gradients._fields]  # fmt: skip
        needed = (True, False, True)
        opcheck(
            operators.linear_logps_backward, (*grads, *tensors, labels, None, None, *kept, *needed, *options.flat())
        )


def test_opcheck_of_the_sequence_operators():
    _, _, _, _, cu_seqlens = problem()
    opcheck(sequence_sums.sums_of_sequences, (torch.randn(ROWS, device=DEVICE), cu_seqlens))
    opcheck(sequence_sums.rows_of_sequences, (torch.randn(4, device=DEVICE), cu_seqlens, ROWS))


@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_graph_breaks(backend, frozen):
    hidden, weight, bias, labels, cu_seqlens = problem()
    weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]

    def step(hidden, weight, bias):
        stats = linear_sequence_stats(hidden * 2, weight, labels, cu_seqlens, bias, backend=backend, validate=False)
        loss = amopo_loss(stats, order="alternating", num_dimensions=2, beta=0.8, gamma=2.0, weighting="mean")
        return loss.loss, loss.margins

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (loss, margins), (expected, expected_margins) = compiled(hidden, weight, bias), step(hidden, weight, bias)
    assert torch.equal(loss, expected) and torch.equal(margins, expected_margins)
    gradients = torch.autograd.grad(loss, wanted)
    for a, b in zip(gradients, torch.autograd.grad(expected, wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_token_operator_compiles_with_entropy(backend):
    hidden, weight, bias, labels, _ = problem()

    def step(hidden, weight, bias):
        logps, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True, backend=backend)
        return (logps + 0.1 * entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias))
    for a, b in zip(gradients, torch.autograd.grad(step(hidden, weight, bias), (hidden, weight, bias)), strict=True):
        assert torch.equal(a, b)


class _Hidden:
    """What the rule of `auto` looks at."""

    def __init__(self, device: str, features: int):
        self.device, self.shape = torch.device(device), (4, features)


@pytest.mark.parametrize(
    "device, capability, dtype, features, expected",
    [
        ("cpu", None, torch.bfloat16, 896, "torch"),
        ("cuda", (7, 5), torch.float16, 896, "torch"),
        ("cuda", (9, 0), torch.float64, 896, "torch"),
        ("cuda", (9, 0), torch.float32, 896, "chunked"),
        ("cuda", (9, 0), torch.bfloat16, 896, "fused"),
        ("cuda", (9, 0), torch.bfloat16, 4096, "fused"),
        ("cuda", (9, 0), torch.float16, 5120, "fused"),
        ("cuda", (8, 0), torch.bfloat16, 4096, "fused"),
        ("cuda", (8, 0), torch.bfloat16, 5120, "chunked"),
        ("cuda", (10, 0), torch.bfloat16, 5120, "chunked"),
    ],
)
def test_rule_of_auto(monkeypatch, caplog, device, capability, dtype, features, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "amopo_kernels"):
        for _ in range(2):
            assert dispatch.choose_backend("auto", _Hidden(device, features), dtype) == expected
    assert [record.message.split("(")[0].strip() for record in caplog.records] == [f"backend auto: {expected}"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device to capture a graph")
@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
def test_cuda_graph_replays_with_changed_inputs_and_noise(backend, mode):
    hidden, weight, _, labels, cu_seqlens = problem(dtype=torch.bfloat16)
    weight.requires_grad_(mode != "frozen")
    noise = torch.zeros(1, 2, 2, device=DEVICE)
    wanted = [x for x in (hidden, weight) if x.requires_grad]

    def step():
        stats = linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, backend=backend, validate=False,
            logits_cache_bytes=10**6 if mode == "cached" else 0,
        )  # fmt: skip
        loss = amopo_loss(stats, order="alternating", num_dimensions=2, beta=0.8, gamma=2.0, noise=noise)
        return loss.loss, *torch.autograd.grad(loss.loss, wanted)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for target, source in zip((hidden, weight, labels), (problem(seed, torch.bfloat16)[i] for i in (0, 1, 3)),
                                      strict=True):  # fmt: skip
                target.copy_(source)
            noise.normal_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))

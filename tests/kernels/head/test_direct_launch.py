"""A direct launch hands CUDA's driver what Triton's own launcher hands it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from absent_driver import compiler, environment

from amopo_kernels import linear_sequence_stats
from amopo_kernels.head import direct_launch

PROGRAM = Path(__file__).with_name("launches_without_device.py")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler, which Triton's launcher needs")


def launches(folder, what):
    variables = environment(folder)
    variables["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, PROGRAM, folder, what], env=variables, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@needs_compiler
def test_of_every_kind_of_argument_and_slice(tmp_path):
    found = launches(tmp_path, "kernel")
    assert found["different"] == []
    assert found["slices"] == 30 and found["direct"] == 25  # Triton compiles a begin of 1 in, and launches that


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen", "warp_specialized"])
def test_of_the_head(tmp_path, mode):
    found = launches(tmp_path, mode)
    assert found["different"] == []
    assert found["slices"] == found["direct"] > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
def test_on_a_gpu_the_results_have_the_same_bits(mode, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(direct_launch, "KERNELS", {})
    count = []
    of = direct_launch.DirectKernel.of
    monkeypatch.setattr(direct_launch.DirectKernel, "of", lambda compiled: count.append(of(compiled)) or count[-1])

    V = 90011  # more than two slices of either number of rows

    def run(rows):
        hidden = torch.randn(rows, 896, dtype=torch.bfloat16, device="cuda").requires_grad_()
        weight = torch.randn(V, 896, dtype=torch.bfloat16, device="cuda").mul_(0.03)
        weight.requires_grad_(mode != "frozen")
        labels = torch.randint(0, V, (rows,), device="cuda")
        offsets = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device="cuda")
        wanted = [hidden, weight] if weight.requires_grad else [hidden]
        found = []
        # Twice each: what a first call leaves to Triton, a second one launches directly, in a stream of its own too.
        for enabled, stream in ((False, None), (True, None), (True, None), (True, torch.cuda.Stream())):
            monkeypatch.setattr(direct_launch, "ENABLED", enabled)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                stats = linear_sequence_stats(
                    hidden, weight, labels, offsets, backend="fused", validate=False,
                    logits_cache_bytes=rows * V if mode == "cached" else 0,
                )  # fmt: skip
                found.append([stats.logps, *torch.autograd.grad(stats.logp_sum.sum(), wanted)])
            torch.cuda.synchronize()
        return found

    for rows in (777, 1024):
        first, *others = run(rows)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert count and all(count)  # each kernel could be launched directly

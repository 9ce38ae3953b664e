"""What the benchmarks judge and measure with: the sliced oracle, the errors, the rounds, the memory."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from amopo_kernels import reference

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in ("harness", "head", "head_problem", "head_variants"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("logits", ["normal", "zipf"])
def test_oracle_is_the_reference_in_slices(load, monkeypatch, logits):
    problem = load("head_problem")
    monkeypatch.setattr(problem, "COLUMNS", 70)
    inputs = problem.random_inputs(problem.Case("x", 24, 16, 200, torch.float32, logits), "cpu", 0)
    oracle = problem.Oracle(inputs, samples=10)
    x, w = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logps = reference.linear_logps(x, w, inputs.labels)
    dx, dw = torch.autograd.grad(logps, (x, w), inputs.gradient.double())
    got_dx, got_dw = oracle.gradients(inputs.gradient)
    torch.testing.assert_close(oracle.logps, logps.detach())
    torch.testing.assert_close(got_dx, dx[oracle.rows])
    torch.testing.assert_close(got_dw, dw[oracle.columns])
    assert oracle.largest_logit == pytest.approx((x @ w.T).abs().max().item())
    assert 199 in oracle.columns.tolist()


def test_simpo_is_judged_by_its_own_gradient(load):
    problem, variants = load("head_problem"), load("head_variants")
    inputs = problem.random_inputs(problem.Case("x", 24, 16, 200, torch.float32), "cpu", 0)
    oracle = problem.Oracle(inputs)
    logps = oracle.logps.clone().requires_grad_()
    chosen, rejected = logps.view(8, -1).mean(1).split(4)
    loss = -torch.nn.functional.logsigmoid(variants.BETA * (chosen - rejected) - variants.GAMMA).mean()
    (wanted,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(variants.of_simpo(inputs, oracle), wanted)


@pytest.mark.parametrize(
    "break_it, status",
    [
        (lambda logps: logps, "ok"),
        (lambda logps: logps + 1e-3, "wrong: logps_error"),
        (lambda logps: logps.detach() + 1.001 * (logps - logps.detach()), "wrong: dx_error"),
        (lambda logps: logps * float("nan"), "wrong: logps_error nan"),
    ],
)
def test_a_wrong_output_is_not_timed(load, break_it, status):
    problem, variants, head = load("head_problem"), load("head_variants"), load("head")
    case = problem.Case("x", 24, 16, 200, torch.float32)
    inputs = problem.random_inputs(case, "cpu", 0)

    def build():
        def run(inputs):
            logps = break_it(variants._plain_logps(inputs.hidden, inputs.weight, inputs.labels))
            return logps, inputs.gradient, logps

        return run

    variant, mode = variants.Variant("broken", build), head.Mode("forward+backward", None)
    runner, fields = head.prepare(variant, mode, case, inputs, problem.Oracle(inputs))
    assert fields["status"].startswith(status) and (runner is None) == (status != "ok")


def test_an_absent_peer_is_a_row_with_its_reason(load):
    problem, variants, head = load("head_problem"), load("head_variants"), load("head")
    case = problem.Case("x", 24, 16, 200, torch.float32)
    inputs = problem.random_inputs(case, "cpu", 0)
    variant = variants.Variant("absent", lambda: importlib.import_module("no_such_peer"))
    mode = head.Mode("forward+backward", None)
    runner, fields = head.prepare(variant, mode, case, inputs, problem.Oracle(inputs))
    assert runner is None and fields == {"status": "not run: ModuleNotFoundError: No module named 'no_such_peer'"}


def test_variants_take_turns_and_inputs_rotate(load):
    harness, calls = load("harness"), []
    variants = {name: lambda x, name=name: calls.append((name, x)) for name in "abc"}
    times = harness.measure(variants, ["even", "odd"], device="cpu", rounds=3, warmup=1)
    timed = calls[3:]
    assert [name for name, _ in timed] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [x for _, x in timed] == ["even"] * 3 + ["odd"] * 3 + ["even"] * 3
    assert times["a"]["runs"] == 3
    assert harness.measure(variants, [0], device="cpu", deadline=harness.Deadline(0))["a"]["runs"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident size is read from /proc")
def test_extra_memory_leaves_inputs_and_outputs_out(load):
    harness = load("harness")
    megabytes = torch.ones(2**18)  # float32

    def variant(x):
        scratch = x.repeat(64)
        return scratch[: 32 * 2**18].clone()

    for millions in (7, 6):  # the first block freed raises the size from which glibc maps a block: the second ones stay
        blocks = [torch.ones(millions * 2**20) for _ in range(2)]
        del blocks
    variant(megabytes)
    assert 55 * 2**20 < harness.extra_memory(variant, megabytes, device="cpu") < 75 * 2**20

"""The warp-specialised score kernel: its source on a CPU, what two compilers make of it, and its results on a GPU."""

import pytest
import torch
from head_cases import exact_gradients, problem, relative_error

pytest.importorskip("triton.experimental.gluon")
from amopo_kernels import linear_logps  # noqa: E402
from amopo_kernels.head import score_loop, warp_specialized  # noqa: E402
from amopo_kernels.head.warp_specialized import Ring  # noqa: E402

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


NAME = "warp_specialized_kernel, "


def run(rows=53, features=40, vocabulary=150, dtype=torch.float16, ignored=slice(3, None, 5), **options):
    """(log-probabilities, gradients of hidden and weight), and the exact ones."""
    hidden, weight, labels, _ = problem(rows, features, vocabulary, dtype=dtype)
    labels[::7], labels[ignored] = vocabulary - 1, -100
    logps = linear_logps(hidden, weight, labels, backend="fused", validate=False, **options)
    logps = logps[0] if isinstance(logps, tuple) else logps
    upstream = torch.linspace(-1, 1, rows, device=logps.device)
    found = torch.autograd.grad(logps, (hidden, weight), upstream)
    options = {name: options[name] for name in ("softcap", "temperature") if name in options}
    expected, gradients = exact_gradients(hidden, weight, labels, upstream, **options)
    return (logps, *found), (expected, *gradients)


@on_a_cpu
@pytest.mark.parametrize(
    "ring, options",
    [
        (Ring(16, 2, 1), {}),
        (Ring(16, 3, 3), {"softcap": 9.0, "temperature": 0.8, "return_entropy": True}),
        (Ring(32, 4, 2), {"logits_cache_bytes": 2 * 53 * 128, "softcap": 9.0}),
    ],
)
def test_its_source_computes_the_head(monkeypatch, ring, options):
    from gluon_model import use

    kernel = use(monkeypatch, 0, ring)
    found, expected = run(**options)
    assert kernel.launches == 3  # forward and two slices of the gradient; or two of the forward, one being cached
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert relative_error(a, b) < 1e-3


@on_a_cpu
def test_its_source_ends_without_a_tile(monkeypatch):
    from gluon_model import use

    kernel = use(monkeypatch, 0, Ring(16, 2, 1))
    found, _ = run(ignored=slice(None))
    assert kernel.launches
    assert not any(x.any() for x in found)


@on_a_cpu
def test_the_model_sees_a_broken_protocol(monkeypatch):
    from gluon_model import Program, use

    with monkeypatch.context() as patch:
        use(patch, 0, Ring(16, 2, 3))
        with pytest.raises(Exception, match="all parts wait for each other"):
            run()
    use(monkeypatch, 0, Ring(16, 2, 1))
    monkeypatch.setattr(Program, "wait", lambda self, barrier, parity: self.pause())
    with pytest.raises(Exception, match="more arrivals than it counts|a stage is overwritten"):
        run()


def check(case, *epilogues):
    from compiling import compile_kernels
    from head_launches import is_matmul, launches_of, name_of

    chosen = [x for x in launches_of(90, "fused", specialised=True, **case) if name_of(x).startswith(NAME)]
    chosen = [x for x in chosen if name_of(x).removeprefix(NAME) in epilogues]
    assert len(chosen) == len(epilogues)
    for compiled in compile_kernels(chosen):
        compiled.check(matmul=is_matmul(compiled.launch))
        assert compiled.registers <= 168  # at the start; three groups of four warps then share out what is left
        for instruction in ("cp.async.bulk.tensor.2d", "mbarrier.try_wait", "setmaxnreg.inc", "m64n256k16"):
            assert instruction in compiled.ptx


def test_it_compiles():
    check({}, "LogSumExp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"cached": True, "softcap": 30.0},
        {"softcap": 30.0, "outputs": "entropy,lse,mean_logit,top1"},
        {"dtype": torch.float16, "counted": True},
    ],
)
def test_it_compiles_with_options(case):
    check(case, "LogSumExp", "LogitGradient")


def test_what_it_leaves_to_triton():
    from head_launches import launches_of, name_of

    def specialised(cc=90, **case):
        names = [name_of(x) for x in launches_of(cc, "fused", specialised=True, **case)]
        return [name.removeprefix(NAME) for name in names if name.startswith(NAME)]

    assert specialised(bias=True) == specialised(frozen=True) == ["LogSumExp"]
    assert specialised(features=900) == specialised(dtype=torch.float32) == []
    assert specialised(cc=80) == specialised(cc=100) == []


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no device of sm_90"
)
@pytest.mark.parametrize(
    "ring, dtype, options",
    [
        (warp_specialized.RING, torch.bfloat16, {}),
        (warp_specialized.RING, torch.float16, {"softcap": 9.0, "temperature": 0.8, "return_entropy": True}),
        (Ring(32, 9, 6), torch.bfloat16, {"temperature": 1.3}),
    ],
)
def test_on_a_gpu_it_is_as_exact_as_triton(monkeypatch, ring, dtype, options):
    """And repeats bit by bit. Several tiles a program and fewer, rows, columns and features that fill no tile."""
    monkeypatch.setattr(warp_specialized, "RING", ring)
    bound = 1e-4 if dtype == torch.float16 else 1e-3
    for rows, features, vocabulary in ((777, 904, 20011), (40, 72, 300)):
        runs = []
        for enabled in (False, True, True):
            monkeypatch.setattr(score_loop, "WARP_SPECIALIZED", enabled)
            found, expected = run(rows, features, vocabulary, dtype, **options)
            torch.cuda.synchronize()
            runs.append(found)
        triton, first, second = runs
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(first[0].double(), expected[0], rtol=1e-5, atol=1e-4)
        for ours, theirs, exact in zip(first[1:], triton[1:], expected[1:], strict=True):
            assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact) + bound


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no device of sm_90"
)
def test_on_a_gpu_it_is_what_runs(monkeypatch):
    scores, used = warp_specialized.scores, []
    monkeypatch.setattr(score_loop, "WARP_SPECIALIZED", True)
    monkeypatch.setattr(warp_specialized, "scores", lambda *arguments: used.append(arguments[2]) or scores(*arguments))
    found, _ = run(64, 64, 300, torch.bfloat16)
    torch.cuda.synchronize()
    assert [type(epilogue).__name__ for epilogue in used] == ["LogSumExp", "LogitGradient"]
    assert not any(x.isnan().any() for x in found)

"""Ignored rows: whatever they hold touches nothing, and they are not computed, with and without reading how many."""

import pytest
import torch
from head_cases import ALL_BACKENDS, DEVICE, exact_gradients, problem, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from amopo_kernels import linear_logps
from amopo_kernels.head import operators

pytest.importorskip("triton")
ROWS = 36  # more than a tile of the interpreter's
IGNORED = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))[: ROWS - 9]
READS = (None, False)  # validate: may the number of rows be read?


def case(bias=True, dtype=torch.float32):
    hidden, weight, labels, offset = problem(ROWS, 16, 130, dtype, bias=bias)
    labels[IGNORED.to(DEVICE)] = -100
    return hidden, weight, labels, offset


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("validate", READS)
@pytest.mark.parametrize("frozen, poison", [(False, float("nan")), (False, float("inf")), (True, float("nan"))])
def test_what_an_ignored_row_holds_touches_nothing(backend, validate, frozen, poison):
    hidden, weight, labels, offset = case()
    with torch.no_grad():
        hidden[labels == -100] = poison
    weight.requires_grad_(not frozen), offset.requires_grad_(not frozen)
    logps, entropy = linear_logps(hidden, weight, labels, offset, backend=backend, validate=validate,
                                  return_entropy=True)  # fmt: skip
    ignored = labels == -100
    assert not logps[ignored].any() and not entropy[ignored].any()
    grad = torch.randn(ROWS, device=DEVICE)
    grad[ignored] = float("nan")  # of a loss that divided by their number
    logps.backward(grad)
    clean = hidden.detach().masked_fill(ignored[:, None], 0)
    expected, exact = exact_gradients(
        clean.requires_grad_(), weight.detach().requires_grad_(), labels, grad.masked_fill(ignored, 0),
        offset.detach().requires_grad_(),
    )  # fmt: skip
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    assert not hidden.grad[ignored].any()
    for found, wanted in zip((hidden.grad, weight.grad, offset.grad), exact, strict=True):
        assert found is None or relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("validate", READS)
@pytest.mark.parametrize(
    "kept, dtype", [(0, torch.float32), (1, torch.float32), (9, torch.float16), (ROWS, torch.float32)]
)
def test_gradients_are_those_of_the_other_rows_alone(backend, validate, kept, dtype):
    hidden, weight, labels, offset = problem(ROWS, 16, 130, dtype, bias=True)
    labels[torch.randperm(ROWS, device=DEVICE)[: ROWS - kept]] = -100
    grad, h = torch.randn(2, ROWS, device=DEVICE)
    results = []
    for rows in (slice(None), labels != -100):
        x, w, b = (t.detach().requires_grad_() for t in (hidden[rows], weight, offset))
        found = linear_logps(x, w, labels[rows], b, backend=backend, validate=validate, outputs=("entropy", "top1"))
        torch.autograd.backward(found[:2], (grad[rows], h[rows]))
        results.append([*found, x.grad, w.grad, b.grad])
    (*whole, dw, db), (*alone, dw_alone, db_alone) = results
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for found, wanted in zip(whole, alone, strict=True):
        torch.testing.assert_close(found[labels != -100], wanted, rtol=tolerance, atol=tolerance)
        assert not found[labels == -100].any()
    torch.testing.assert_close(dw, dw_alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(db, db_alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_only_the_other_rows_reach_the_matmuls(backend, monkeypatch):
    seen = []
    implementation = operators._implementation(backend)
    for name in ("forward", "backward"):
        function = getattr(implementation, name)

        def watched(problem, *args, function=function, **options):
            seen.append(problem.rows)
            return function(problem, *args, **options)

        monkeypatch.setattr(implementation, name, watched)
    hidden, weight, labels, offset = case()
    linear_logps(hidden, weight, labels, offset, backend=backend, validate=True).sum().backward()
    assert seen == [9, 9]


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_skips_whole_tiles_of_rows_without_reading_their_number(frozen, monkeypatch):
    """What is never written keeps what stood there: statistics of strips past the tile that the 9 rows lie in."""
    from amopo_kernels.head import passes

    tables = []
    empty = passes.StripStatistics.empty

    def filled(problem, strip):
        statistics = empty(problem, strip)
        tables.append(statistics.tables.maximum.fill_(7))
        return statistics

    monkeypatch.setattr(passes.StripStatistics, "empty", filled)
    hidden, weight, labels, _ = case(bias=False)
    weight.requires_grad_(not frozen)
    linear_logps(hidden, weight, labels, backend="fused", validate=False).sum().backward()
    written = (tables[0] != 7).all(0)
    assert written[:9].all() and not written[32:].any()


class NoReading(TorchDispatchMode):
    """Refuses operations whose result depends on values, and so would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_where_that_would_wait():
    from amopo_kernels.head.kept_rows import KeptRows
    from amopo_kernels.head.options import Options

    labels = case()[2]
    options = Options(None, 1.0, -100, "", torch.float32, "fused", "exact", 0, False, False)
    with NoReading():
        kept = KeptRows.of(labels, options)
        back = kept.put(kept.take(labels))
    assert torch.equal(back, labels.masked_fill(labels == -100, 0)) and int(kept.count) == 9

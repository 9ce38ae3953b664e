"""`fused` and `chunked` at the edges: subsets of gradients, no rows, strides, bad labels and offsets, refusals."""

import pytest
import torch
from head_cases import BACKENDS, DEVICE, exact_gradients, in_float64, problem, relative_error

from amopo_kernels import (
    DoubleBackwardError,
    UnsupportedError,
    dispatch,
    linear_logps,
    linear_sequence_stats,
    reference,
)
from amopo_kernels.head import launch, layout, passes
from amopo_kernels.head.options import OUTPUTS

pytest.importorskip("triton")


@pytest.mark.parametrize("backend, entropy", [("fused", False), ("chunked", True)])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_gradients(backend, needed, entropy):
    hidden, weight, labels, bias = problem(9, 24, 70, bias=True)
    tensors = (hidden, weight, bias)
    for bit, x in enumerate(tensors):
        x.requires_grad_(bool(needed >> bit & 1))
    found = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=entropy)
    exact = in_float64(*tensors)
    expected = reference.linear_logps(*exact[:2], labels, exact[2], return_entropy=entropy)
    (found[0].sum() + found[1].sum() * 2 if entropy else found.sum()).backward()
    (expected[0].sum() + expected[1].sum() * 2 if entropy else expected.sum()).backward()
    for bit, (a, b) in enumerate(zip(tensors, exact, strict=True)):
        assert (a.grad is not None) == bool(needed >> bit & 1)
        if a.grad is not None:
            assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_holds_whole_slices(backend):
    """Memory for 1.6 slices of 128 columns keeps one."""
    gradients = []
    for columns in (128, 205):
        hidden, weight, labels, _ = problem(20, 24, 300)
        cu_seqlens = torch.arange(21, dtype=torch.int32, device=DEVICE)
        stats = linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=20 * columns * 4
        )
        stats.logp_sum.backward(torch.linspace(-1, 1, 20, device=DEVICE))
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_memory_held_before_is_in_no_result(backend, frozen):
    """New memory is full of NaN here; the vocabulary ends inside the first slice and a strip."""
    hidden, weight, labels, bias = problem(9, 16, 70, bias=True)
    weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    torch.use_deterministic_algorithms(True, warn_only=True)  # in which torch fills it
    try:
        assert torch.empty(3).isnan().all()
        found = linear_logps(
            hidden, weight, labels, bias, outputs=() if frozen else OUTPUTS[:3], backend=backend, softcap=6.0,
            logits_cache_bytes=9 * 256 * 4,
        )  # fmt: skip
        found = (found,) if frozen else found
        gradients = torch.autograd.grad(sum(found).sum(), [x for x in (hidden, weight, bias) if x.requires_grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (*found, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight, labels, bias = problem(0, 24, 140, bias=True)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    frozen = linear_sequence_stats(hidden, weight.detach(), labels, cu_seqlens, backend=backend).logp_sum.sum()
    assert torch.autograd.grad(frozen, hidden)[0].shape == (0, 24)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, bias, backend=backend)
    stats.logp_sum.sum().backward()
    assert not stats.logp_sum.any() and not stats.length.any() and hidden.grad.shape == (0, 24)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_rows_that_no_descriptor_can_read(backend):
    torch.manual_seed(2)
    hidden = torch.randn(26, 33, device=DEVICE)[::2, :31]  # rows of 33 floats, 31 of them used
    weight = torch.randn(31, 150, device=DEVICE).T
    labels = torch.randint(0, 150, (26,), device=DEVICE)[::2]
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_logps(hidden, weight, labels, backend=backend).sum().backward()
    _, exact = exact_gradients(hidden, weight, labels, torch.ones(13, device=DEVICE))
    assert relative_error(hidden.grad, exact[0]) < 1e-5 and relative_error(weight.grad, exact[1]) < 1e-5


@pytest.mark.parametrize("step", [0, 4])
def test_rows_that_share_memory_are_read_from_a_copy(step, monkeypatch):
    """Of which a tensor map is refused, or another matrix."""
    operands, source = [], launch.source
    monkeypatch.setattr(launch, "source", lambda x, *block: operands.append(x) or source(x, *block))
    torch.manual_seed(4)
    hidden = torch.randn(64, device=DEVICE).as_strided((5, 32), (step, 1)).requires_grad_()
    weight, labels = torch.randn(70, 32, device=DEVICE), torch.arange(5, device=DEVICE)
    logps = linear_logps(hidden, weight, labels, backend="fused")
    assert operands and all(x.stride(0) >= x.shape[1] for x in operands)
    torch.testing.assert_close(logps, linear_logps(hidden, weight, labels, backend="torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    results = []
    for _ in range(2):
        hidden, weight, labels, bias = problem(35, 24, 150, torch.bfloat16, bias=True)
        logps, entropy = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=True)
        (logps + 0.1 * entropy).sum().backward()
        results.append((logps, entropy, hidden.grad, weight.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_retain_graph_and_double_backward(backend):
    hidden, weight, labels, _ = problem(9, 24, 300)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    for cache in (0, 9 * 256 * 4):
        total = linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=cache
        ).logp_sum.sum()
        first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for head in (weight, weight.detach()):
        logps = linear_logps(hidden, head, labels, backend=backend)
        (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
        with pytest.raises(DoubleBackwardError):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_stored_without_gradients(backend):
    hidden, weight, labels, _ = problem(5, 24, 140)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    before = dispatch.runs()
    with torch.no_grad():
        assert linear_logps(hidden, weight, labels, backend=backend).grad_fn is None
        linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend=backend, logits_cache_bytes=10**6)
    ran = {key: count - before.get(key, 0) for key, count in dispatch.runs().items() if count != before.get(key, 0)}
    assert ran == {(backend, "exact"): 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 140, 2**40, -(2**40)])
def test_bad_labels_give_nan_on_their_row(backend, bad):
    hidden, weight, labels, _ = problem(20, 24, 140)
    good = linear_logps(hidden, weight, labels, backend=backend)
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"labels\[2\] = {bad}.*140 tokens"):
        linear_logps(hidden, weight, labels, backend=backend, validate=True)
    found, entropy = linear_logps(hidden, weight, labels, backend=backend, validate=False, return_entropy=True)
    assert found[2].isnan() and entropy[2].isnan()
    kept = torch.arange(20) != 2
    torch.testing.assert_close(found[kept], good[kept])
    found.sum().backward()
    assert hidden.grad[2].isnan().all() and not hidden.grad[kept].isnan().any()
    frozen = hidden.detach().requires_grad_()
    linear_logps(frozen, weight.detach(), labels, backend=backend, validate=False).sum().backward()
    assert frozen.grad[2].isnan().all() and not frozen.grad[kept].isnan().any()


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [1, 3, 5], [0, 3, 6], [0, -4, 5], [0, 9, 5]])
def test_bad_offsets_give_nan(offsets):
    hidden, weight, labels, _ = problem(5, 24, 140)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    stats = linear_sequence_stats(hidden, weight, labels, cu_seqlens, backend="fused", validate=False)
    assert stats.logp_sum.isnan().all() and stats.prob_mean.isnan().all() and stats.prob_std.isnan().all()
    assert (stats.length == 1).all()
    stats.logp_sum.sum().backward()
    assert hidden.grad.isnan().all()


def test_probability_statistics_of_long_and_certain_sequences():
    """Two passes: sum p^2 - n mean^2 is 0 or negative in float32 where every p is near 1."""
    from amopo_kernels.statistics.sequence_sums import sequence_sums

    torch.manual_seed(3)
    lengths = [1, 0, 1500, 2, 3000]
    logps = torch.cat([-torch.rand(1) * 9, -1e-4 * torch.rand(1500), -torch.rand(2), -9 * torch.rand(3000)]).to(DEVICE)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    found = sequence_sums(logps, cu_seqlens)
    expected = reference.sequence_stats(logps.double(), cu_seqlens)
    # A float32 probability near 1 is known to 6e-8: relative to a deviation of 3e-5 that is 2e-3.
    for a, b, tolerance in zip(found, expected, (1e-6, 0, 1e-6, 2e-3), strict=False):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=0)


def test_autocast_rounds_the_operands_and_nothing_else():
    hidden, weight, labels, bias = problem(21, 24, 150, bias=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_logps(hidden, weight, labels, bias, backend="fused")
    found.sum().backward()
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    logps, exact = exact_gradients(
        rounded[0].requires_grad_(), rounded[1].requires_grad_(), labels, torch.ones(21, device=DEVICE), bias
    )
    torch.testing.assert_close(found.double(), logps, rtol=1e-5, atol=1e-5)
    for a, b in zip((hidden, weight, bias), exact, strict=True):
        assert a.grad.dtype == torch.float32 and relative_error(a.grad, b) < 3e-3


def test_unsupported_requests_are_named():
    hidden, weight, labels, _ = problem(5, 24, 140, torch.float64)
    with pytest.raises(UnsupportedError, match="'fused'.*float64"):
        linear_logps(hidden, weight, labels, backend="fused")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["exact", "cached", "frozen"])
def test_nothing_is_written_past_the_buffer_of_a_slice(backend, mode, monkeypatch):
    """Epilogues store whole tiles of rows; behind the last one memory stays as it was."""
    buffers = []

    def guarded(hidden, width):
        rows = hidden.shape[0]
        tiles = -(-rows // layout.BUFFER_ROWS) * layout.BUFFER_ROWS
        buffers.append(hidden.new_full((tiles + layout.BUFFER_ROWS, width), -7.0))
        return buffers[-1][:rows]

    monkeypatch.setattr(passes, "slice_buffer", guarded)
    for rows in (1, 37):
        hidden, weight, labels, bias = problem(rows, 16, 150, bias=True)
        weight.requires_grad_(mode != "frozen"), bias.requires_grad_(mode != "frozen")
        offsets = torch.tensor([0, rows], dtype=torch.int32, device=DEVICE)
        linear_sequence_stats(
            hidden, weight, labels, offsets, bias, backend=backend, logits_cache_bytes=10**6 * (mode == "cached")
        ).logp_sum.sum().backward()
        written = buffers[-1]
        assert (written[:rows] != -7).any() and (written[-layout.BUFFER_ROWS :] == -7).all()

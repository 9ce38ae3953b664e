"""The head under torch's transforms: torch.func, checkpointing, saved-tensor hooks, fake tensors, export, released
weights. What it cannot do is refused by name, in every backend."""

from unittest import mock

import pytest
import torch
from head_cases import ALL_BACKENDS, DEVICE, problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from amopo_kernels import (
    DoubleBackwardError,
    ReleasedTensorError,
    UnsupportedError,
    linear_logps,
    linear_sequence_stats,
    sequence_stats,
)
from amopo_kernels.head.kept_scores import KeptScores

pytest.importorskip("triton")
# vmap says that it runs the operators in a loop
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
each_backend = pytest.mark.parametrize("backend", ALL_BACKENDS)


def tensors(frozen=False):
    hidden, weight, labels, bias = problem(8, 16, 150, bias=True)
    labels[3] = -100
    return hidden, weight.requires_grad_(not frozen), bias.requires_grad_(not frozen), labels


@each_backend
@pytest.mark.parametrize("frozen", [False, True])
def test_func_grad_is_the_gradient(backend, frozen):
    hidden, weight, bias, labels = tensors(frozen)

    def loss(*tensors):
        logps, entropy = linear_logps(*tensors[:2], labels, tensors[2], return_entropy=True, backend=backend)
        return (logps * logps.detach() + entropy).sum()

    wanted = (hidden,) if frozen else (hidden, weight, bias)
    expected = torch.autograd.grad(loss(hidden, weight, bias), wanted)
    found = torch.func.grad(loss, tuple(range(len(wanted))))(hidden, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    _, pull = torch.func.vjp(loss, hidden, weight, bias)
    # With a gradient of weight the torch backend keeps scores, which gives other last digits.
    torch.testing.assert_close(pull(torch.ones((), device=DEVICE))[0], expected[0], rtol=1e-5, atol=1e-6)


@each_backend
def test_vmap_and_gradients_of_every_sample(backend):
    hidden, weight, bias, labels = (x.detach() for x in tensors())

    def loss(weight, hidden, labels):
        return linear_logps(hidden, weight, labels, bias, backend=backend).sum()

    pairs = hidden.view(4, 2, 16), labels.view(4, 2)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, *pairs)
    values = torch.func.vmap(loss, in_dims=(None, 0, 0))(weight, *pairs)
    for i, (x, y) in enumerate(zip(*pairs, strict=True)):
        w = weight.clone().requires_grad_()
        logps = loss(w, x, y)
        torch.testing.assert_close(values[i], logps.detach())
        torch.testing.assert_close(found[i], torch.autograd.grad(logps, w)[0])
    jacobian = torch.func.jacrev(lambda x: linear_logps(x, weight, labels, bias, backend=backend))(hidden)
    x = hidden.clone().requires_grad_()
    (row,) = torch.autograd.grad(linear_logps(x, weight, labels, bias, backend=backend)[5], x)
    torch.testing.assert_close(jacobian[5], row)


@each_backend
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_and_second_derivatives_are_refused_by_name(backend, frozen):
    hidden, weight, bias, labels = tensors(frozen)

    def function(x):
        return linear_logps(x, weight, labels, bias, backend=backend)

    with pytest.raises(UnsupportedError, match="linear_logps has no forward-mode derivative"):
        torch.func.jvp(function, (hidden.detach(),), (torch.ones_like(hidden),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        function(torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden)))
    with pytest.raises((UnsupportedError, NotImplementedError)):
        torch.func.hessian(lambda x: function(x).sum())(hidden.detach())
    (gradient,) = torch.autograd.grad(function(hidden).sum(), hidden, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="linear_logps has no second derivative"):
        gradient.square().sum().backward()


def test_sequence_sums_refuse_forward_mode():
    from amopo_kernels.statistics.sequence_sums import sequence_sums

    logps = -torch.rand(5, device=DEVICE)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(UnsupportedError, match="sequence_stats has no forward-mode"):
        torch.func.jvp(lambda x: sequence_sums(x, cu_seqlens)[0], (logps,), (torch.ones_like(logps),))
    factor = torch.tensor([2.0, 3.0], device=DEVICE)
    gradient = torch.func.grad(lambda x: (sequence_sums(x, cu_seqlens)[0] * factor).sum())(logps)
    assert gradient.tolist() == [2, 2, 3, 3, 3]


@each_backend
@pytest.mark.parametrize("mode", ["exact", "frozen", "cached"])
def test_checkpointing_and_saved_tensor_hooks(backend, mode):
    if backend == "torch" and mode == "cached":
        pytest.skip("the torch backend has no cache")
    hidden, weight, bias, labels = tensors(mode == "frozen")
    labels[3] = 7
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)

    def function(hidden, weight, bias):
        cache = 8 * 128 * 4 if mode == "cached" else 0
        return linear_sequence_stats(
            hidden, weight, labels, cu_seqlens, bias, backend=backend, logits_cache_bytes=cache
        ).logp_sum

    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    expected = torch.autograd.grad(function(hidden, weight, bias).sum(), wanted)
    found = torch.autograd.grad(checkpoint(function, hidden, weight, bias, use_reentrant=False).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    packed, unpacked = [], []

    def pack(x):
        packed.append(x)
        return len(packed) - 1

    def unpack(i):
        unpacked.append(i)
        return packed[i].clone()

    with saved_tensors_hooks(pack, unpack):
        total = function(hidden, weight, bias).sum()
    found = torch.autograd.grad(total, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sorted(unpacked) == list(range(len(packed))), "every saved tensor is handed out once"


@each_backend
def test_fake_tensors_and_export_need_no_option(backend):
    hidden, weight, bias, labels = (x.detach() for x in tensors())
    with FakeTensorMode() as mode:
        x, w, b, y = (mode.from_tensor(t) for t in (hidden, weight, bias, labels))
        logps, top1 = linear_logps(x.requires_grad_(), w.requires_grad_(), y, b, outputs=("top1",), backend=backend)
        assert logps.shape == (8,) and top1.dtype == torch.int64
        logps.sum().backward()
        assert x.grad.shape == x.shape and w.grad.shape == w.shape
        stats = linear_sequence_stats(x, w, y, torch.zeros(4, dtype=torch.int32, device=DEVICE), backend=backend)
        assert stats.logp_sum.shape == (3,)
        assert sequence_stats(logps, torch.zeros(4, dtype=torch.int32, device=DEVICE)).length.shape == (3,)

    class Head(torch.nn.Module):
        def forward(self, hidden, weight, labels, bias):
            return linear_logps(hidden, weight, labels, bias, backend=backend, softcap=5.0)

    program = torch.export.export(Head(), (hidden, weight, labels, bias))
    assert "amopo_kernels.linear_logps" in program.graph_module.code
    expected = linear_logps(hidden, weight, labels, bias, backend=backend, softcap=5.0)
    assert torch.equal(program.module()(hidden, weight, labels, bias), expected)


def test_the_torch_backend_compiles_without_graph_breaks():
    hidden, weight, bias, labels = tensors()

    def step(hidden, weight, bias):
        logps, entropy = linear_logps(hidden, weight, labels, bias, return_entropy=True, backend="torch")
        return (logps + 0.1 * entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with mock.patch.object(KeptScores, "empty", side_effect=AssertionError("an output would be an input's memory")):
        compiled(hidden, weight, bias)
    gradients = [torch.autograd.grad(f(hidden, weight, bias), (hidden, weight, bias)) for f in (compiled, step)]
    for found, expected in zip(*gradients, strict=True):  # of scores that are kept, which compiled code does not do
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(hidden, weight, bias), step(hidden, weight, bias))


@each_backend
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("release", ["data", "storage"])
def test_a_weight_that_is_released_before_the_backward(backend, frozen, release):
    """As ZeRO-3 (data) and FSDP (storage) do after the forward of the module that owns it."""
    hidden, weight, bias, labels = tensors(frozen)
    expected = torch.autograd.grad(linear_logps(hidden, weight, labels, bias, backend=backend).sum(), hidden)[0]
    weight = weight.detach().clone().requires_grad_(not frozen)
    logps = linear_logps(hidden, weight, labels, bias, backend=backend)
    if release == "data":
        weight.data = torch.empty(0, device=DEVICE)
    else:
        weight.untyped_storage().resize_(0)
    if frozen:  # nothing of it is needed any more
        logps.sum().backward()
        assert torch.equal(hidden.grad, expected)
    else:
        with pytest.raises(ReleasedTensorError, match="weight.*between the forward and the backward|weight was"):
            logps.sum().backward()


@each_backend
def test_an_entropy_of_a_frozen_weight_that_is_released_is_refused(backend):
    hidden, weight, bias, labels = tensors(frozen=True)
    _, entropy = linear_logps(hidden, weight, labels, bias, backend=backend, return_entropy=True)
    weight.data = torch.empty(0, 16, device=DEVICE)
    with pytest.raises(ReleasedTensorError, match=r"weight was \(150, 16\)"):
        entropy.sum().backward()

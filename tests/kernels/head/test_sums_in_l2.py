"""dX32 summed by TMA's reductions: the bits are those of reading, adding and writing."""

import dataclasses

import pytest
import torch
from compiling import compile_kernels
from head_cases import DEVICE, problem
from head_launches import launches_of, name_of

from amopo_kernels import linear_logps
from amopo_kernels.head import launch, slice_gradients


def switch(monkeypatch, on):
    def switched(configuration):
        return dataclasses.replace(configuration, add_in_l2=on)

    monkeypatch.setattr(launch, "INTERPRETER", switched(launch.INTERPRETER))
    monkeypatch.setitem(launch.SIXTEEN_BIT, 90, switched(launch.SIXTEEN_BIT[90]))


def assert_same_bits(rows, features, vocabulary, dtype, monkeypatch):
    used = []
    make = launch.SliceLaunch

    def watched(*arguments, **constants):
        used.append(constants.get("IN_L2", False))
        return make(*arguments, **constants)

    def gradient():
        hidden, weight, labels, _ = problem(rows, features, vocabulary, dtype)
        logps = linear_logps(hidden, weight, labels, backend="fused", validate=False)
        logps.backward(torch.linspace(-1, 1, rows, device=DEVICE))
        return hidden.grad

    monkeypatch.setattr(launch, "SliceLaunch", watched)
    switch(monkeypatch, False)
    expected = gradient()
    assert expected.norm() > 0 and not any(used)
    switch(monkeypatch, True)
    assert torch.equal(gradient(), expected) and sum(used) == 1


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no CUDA device of sm_90"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled below")
@pytest.mark.parametrize("splits", [1, 2])
def test_the_bits_are_the_same(splits, monkeypatch):
    """Of ragged tiles, three slices and, with two splits, tiles that reach into the next split's rows."""
    monkeypatch.setattr(slice_gradients, "splits_of_d_hidden", lambda tiles, processors: splits)
    assert_same_bits(37, 72, 301, torch.float32, monkeypatch)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [4096, 1000])  # of 1000 the sum is split
def test_the_bits_are_the_same_on_a_gpu(rows, monkeypatch):
    assert_same_bits(rows, 904, 20011, torch.bfloat16, monkeypatch)


def test_it_compiles():
    (found,) = [x for x in launches_of(90, "fused") if name_of(x) == "_d_hidden_kernel"]
    (compiled,) = compile_kernels([found])
    compiled.check(matmul=True)
    assert "cp.reduce.async.bulk.tensor" in compiled.ptx and "ld.global" not in compiled.ptx

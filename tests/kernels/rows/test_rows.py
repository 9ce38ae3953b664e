"""gather_rows and its gradient: against float64, the same bits every time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_kernels import DoubleBackwardError, UnsupportedError, gather_rows, inverse_index, segment_sum_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def case(seed, places, rows, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # Squared: early rows have many places, as a prompt's have, and late ones one or none.
    indices = (torch.rand(places, generator=generator).square() * rows).long().clamp(max=rows - 1)
    values = (torch.randn(places, *shape, generator=generator) * 3).to(dtype)
    order, offsets = inverse_index(indices, rows)
    return [x.to(DEVICE) for x in (values, indices, order, offsets)]


def exact(values, indices, rows):
    return values.new_zeros(rows, *values.shape[1:], dtype=torch.float64).index_add_(0, indices, values.double())


# Half a unit in the last place; Triton's interpreter cuts to bfloat16 instead of rounding, so a whole one there.
BFLOAT16 = 2**-8 if DEVICE == "cuda" else 2**-7
ROUNDING = [(torch.float32, 1e-6), (torch.bfloat16, BFLOAT16), (torch.float16, 2**-11)]


@pytest.mark.parametrize("dtype, tolerance", ROUNDING)
@pytest.mark.parametrize("places, rows, shape", [(90, 20, (2, 8)), (300, 7, (3,)), (17, 40, (1, 1)), (64, 9, (5, 260))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, places, rows, shape, dtype, tolerance):
    values, indices, order, offsets = case(places, places, rows, shape, dtype)
    got = segment_sum_rows(values, order, offsets, backend=backend)
    assert got.dtype == dtype and got.shape == (rows, *shape)
    wanted = exact(values, indices, rows)
    # One rounding of a sum whose terms are exact: relative to the largest partial sum.
    scale = exact(values.abs(), indices, rows) if dtype == torch.float32 else wanted.abs().clamp(min=1e-3)
    assert ((got.double() - wanted).abs() <= tolerance * scale + 1e-6 * exact(values.abs(), indices, rows)).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_number_and_of_none(backend, shape):
    values, indices, order, offsets = case(2, 30, 7, shape)
    got = segment_sum_rows(values, order, offsets, backend=backend)
    assert got.shape == (7, *shape)
    torch.testing.assert_close(got.double(), exact(values, indices, 7), rtol=1e-6, atol=1e-6)
    x = torch.ones(7, *shape, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_rows(x, indices, order, offsets).sum(), x)
    assert torch.equal(gradient, exact(torch.ones_like(values), indices, 7).float())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 12), st.integers(1, 20))
def test_ragged_shapes(seed, places, rows, columns):
    values, indices, order, offsets = case(seed, places, rows, (columns,))
    for backend in BACKENDS:
        got = segment_sum_rows(values, order, offsets, backend=backend)
        torch.testing.assert_close(got.double(), exact(values, indices, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time_and_the_order_of_a_loop(backend):
    values, indices, order, offsets = case(1, 400, 11, (4, 16))
    first = segment_sum_rows(values, order, offsets, backend=backend)
    for _ in range(3):
        assert torch.equal(segment_sum_rows(values, order, offsets, backend=backend), first)
    if backend == "triton":
        loop = torch.zeros(11, 4, 16, device=DEVICE)
        for place, row in enumerate(indices.tolist()):
            loop[row] += values[place]
        assert torch.equal(first, loop)


def test_gradient_in_float64():
    _, indices, order, offsets = case(2, 30, 9, (3,))
    x = torch.randn(9, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, indices, order, offsets), x)


def test_a_bfloat16_gradient_is_rounded_once():
    """2049 ones: bfloat16 addition would stop at 256."""
    indices = torch.zeros(2049, dtype=torch.int64, device=DEVICE)
    order, offsets = inverse_index(indices, 1)
    x = torch.zeros(1, 4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    gather_rows(x, indices, order, offsets).sum().backward()
    assert x.grad.tolist() == [[2048.0] * 4]


def test_strided_gradients():
    values, indices, order, offsets = case(3, 50, 8, (4, 6))
    strided = values.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in BACKENDS:
        got = segment_sum_rows(strided, order, offsets, backend=backend)
        torch.testing.assert_close(got.double(), exact(values, indices, 8), rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused():
    values, indices, order, offsets = case(4, 10, 5, (3,))
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match=r"offsets must be \(6,\)"):
        gather_rows(x, indices, order, offsets[:-1])
    with pytest.raises(TypeError, match="order must be int32"):
        gather_rows(x, indices, order.long(), offsets)
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        gather_rows(x, indices.float(), order, offsets)
    with pytest.raises(ValueError, match="not the inverse of indices"):
        gather_rows(x, indices, order.flip(0), offsets, validate=True)
    with pytest.raises(ValueError, match="choose one of auto"):
        segment_sum_rows(values, order, offsets, backend="fused")
    with pytest.raises(UnsupportedError, match="float64"):
        segment_sum_rows(values.double(), order, offsets, backend="triton")
    (first,) = torch.autograd.grad(gather_rows(x, indices, order, offsets).square().sum(), x, create_graph=False)
    assert first.shape == x.shape
    (first,) = torch.autograd.grad(gather_rows(x, indices, order, offsets).square().sum(), x, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        first.sum().backward()


def test_unchecked_wrong_offsets_read_nothing_out_of_bounds():
    values, _, order, offsets = case(5, 10, 5, (3,))
    offsets = torch.tensor([-7, 3, 10**6, 2, 10**9, 5], dtype=torch.int32, device=DEVICE)
    order = order * 10**6 - 3
    got = segment_sum_rows(values, order, offsets, backend="triton")
    assert (got == 0).all()  # no place is inside

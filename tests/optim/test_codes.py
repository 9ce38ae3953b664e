"""The Triton kernel's codes are those of the states' definition, for every float32 around which a code changes."""

import pytest
import torch

from amopo_fast.optim.states import _nearest, quantisation_map
from amopo_fast.optim.update_triton import code_table

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from amopo_fast.optim.update_triton import _code  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _codes_kernel(y_ptr, table_ptr, out_ptr, BLOCK: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _code(tl.load(y_ptr + at), table_ptr, BITS, SIGNED).to(tl.uint8))


def codes(y, states, signed):
    y = torch.nn.functional.pad(y, (0, -len(y) % 4096)).to(DEVICE)
    out = torch.empty(len(y), dtype=torch.uint8, device=DEVICE)
    table = code_table(states, signed, torch.device(DEVICE))
    _codes_kernel[(len(y) // 4096,)](y, table, out, BLOCK=4096, BITS=8 if states == "8bit" else 4, SIGNED=signed)
    return out.cpu()


def neighbours(values, distance):
    """Every float32 up to so many places from the values."""
    offsets = torch.arange(-distance, distance + 1, dtype=torch.int32)
    return (values.view(torch.int32)[:, None] + offsets).view(torch.float32).flatten()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_every_code_around_every_border(states, signed):
    torch.manual_seed(0)
    ascending = quantisation_map(states, signed, torch.device("cpu"))
    borders = (ascending[1:].double() + ascending[:-1].double()) / 2
    decades = 10.0 ** -torch.arange(9.0)
    spread = 2.0 ** (torch.rand(1 << 15) * -26)
    y = torch.cat([neighbours(borders.float(), 40), neighbours(ascending, 10), neighbours(decades, 40), spread,
                   torch.tensor([0.0, 2.0**-149, 1.0, 1 + 2.0**-22])])  # fmt: skip
    y = torch.cat([y, -y]) if signed else y
    y = y[(y >= 0) | (y < 0) & signed]  # no NaN
    found, expected = codes(y, states, signed)[: len(y)], _nearest(y, ascending)
    assert set(expected.tolist()) == set(range(len(ascending)))
    assert torch.equal(found, expected)


def test_the_borders_are_the_smallest_numbers_above():
    for states, signed in (("8bit", True), ("8bit", False), ("4bit", True), ("4bit", False)):
        values, first = code_table(states, signed, torch.device("cpu"))
        assert torch.equal(values, quantisation_map(states, signed, torch.device("cpu"))) and first[-1] == torch.inf
        lower = torch.arange(len(values) - 1, dtype=torch.uint8)
        assert torch.equal(_nearest(first[:-1], values), lower + 1)
        assert torch.equal(_nearest(first[:-1].nextafter(-torch.ones(())), values), lower)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("states, signed", [("8bit", True), ("8bit", False), ("4bit", True), ("4bit", False)])
def test_not_a_number_is_code_0(states, signed):
    assert not codes(torch.tensor([float("nan"), -float("nan")]).repeat(8), states, signed)[:16].any()

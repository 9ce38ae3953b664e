"""What tests/helpers/interpreted.py remembers for the interpreter is what Triton would make each time."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
SCALARS = [tl.int1, tl.int8, tl.uint16, tl.int32, tl.int64, tl.bfloat16, tl.float16, tl.float32, tl.float64]


def test_block_types_are_kept_apart_by_element_and_shape():
    elements = [*SCALARS, *map(tl.pointer_type, SCALARS)]
    cases = list(itertools.product(elements, [(2,), (4,), (2, 4), (4, 2), (8, 1)]))
    first, again = ([tl.block_type(element, list(shape)) for element, shape in cases] for _ in range(2))
    for found in (first, again):
        for made, (element, shape) in zip(found, cases, strict=True):
            assert [int(size) for size in made.shape] == list(shape) and made.element_ty == element
            assert made.scalar == element and made.numel == torch.Size(shape).numel()
    assert len({each.name for each in first}) == len(cases)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.int32, [3])


def test_the_array_of_a_type_has_its_numbers():
    from triton.runtime.interpreter import _get_np_dtype

    for element in SCALARS:
        stored = {"bf16": "uint16", "int1": "bool", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
        for made in (element, tl.block_type(element, [2])):
            assert _get_np_dtype(made).name == stored.get(element.name, element.name)
        for pointer in (tl.pointer_type(element), tl.block_type(tl.pointer_type(element), [2])):
            assert _get_np_dtype(pointer).name == "uint64"


def test_what_a_launch_replaces_it_restores():
    from amopo_kernels.statistics.sequence_sums import sequence_sums

    before = tl.range, tl.load, tl.tensor.__add__
    assert sequence_sums(torch.ones(5), torch.tensor([0, 2, 5], dtype=torch.int32))[0].tolist() == [2, 3]
    assert (tl.range, tl.load, tl.tensor.__add__) == before

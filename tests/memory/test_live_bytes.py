"""What is counted of the bytes that are alive: the head's slices too, which its operator hides from other modes."""

import pytest
import torch

from amopo_fast.memory.profile import LiveBytes
from amopo_kernels import linear_logps
from amopo_kernels.head.torch_slices import SLICE_COLUMNS

ROWS, WIDTH = 300, 16


def peaks(slices):
    """(forward, backward) of a head of that many slices, in bytes of one slice of float32 logits; without dW."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(slices * SLICE_COLUMNS, WIDTH, generator=generator)
    labels = torch.randint(len(weight), (ROWS,), generator=generator)
    with LiveBytes([hidden, weight, labels]) as live:
        logps = linear_logps(hidden, weight.requires_grad_(), labels, backend="torch")
        forward, live.peak = live.peak, live.live
        logps.sum().backward()
    slice_bytes = 4 * ROWS * SLICE_COLUMNS
    return forward / slice_bytes, (live.peak - weight.grad.untyped_storage().nbytes()) / slice_bytes


@pytest.mark.parametrize("slices", [1, 5])
def test_one_slice_of_the_logits_is_alive(slices):
    forward, backward = peaks(slices)
    assert 1 <= forward < 1.7 and 1 <= backward < 1.7

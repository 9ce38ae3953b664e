"""How the vocabulary is cut for a GPU, and how the launches of its slices are made, without one."""

import random
from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from amopo_kernels.head import chunked, kept_probabilities, launch, layout
from amopo_kernels.head.options import SLICE_LOGITS

CONFIGURATIONS = {**launch.SIXTEEN_BIT, "float32": launch.FLOAT32, "unaligned": launch.UNALIGNED}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=map(str, CONFIGURATIONS))
def test_a_slice_is_whole_tiles_whatever_the_rows(configuration):
    """A strip of two slices would be written twice: on an H100, with 1000 rows, some lost their largest logit."""
    for tile in (configuration.scores, configuration.d_weight, configuration.d_hidden):
        assert layout.BUFFER % tile.columns == 0 and layout.BUFFER % tile.rows == 0
    chosen = random.Random(0)
    for rows in [0, 1, 511, 512, 1000, 4096, 10**6, *(chosen.randrange(1, 20000) for _ in range(300))]:
        features = chosen.choice([8, 64, 896, 1544, 5120])
        processors = chosen.choice([108, 132, 148])
        for logits in SLICE_LOGITS.values():
            columns = layout._slice_columns(rows, features, configuration, processors, logits)
            assert columns % layout.BUFFER == 0 and 3072 <= columns <= 49152
            assert columns * rows <= max(6144 * rows, 3 * logits // 2 + layout.BUFFER * rows)


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_slices_buffer_holds_whole_tiles_of_rows(interpreted, monkeypatch):
    """Their stores have no mask."""
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    tiles = [configuration.scores.rows for configuration in (*CONFIGURATIONS.values(), launch.INTERPRETER)]
    tiles += [chunked._block()[0], *map(kept_probabilities._block_rows, (32, 64, 256))]
    for rows in (1, 16, 128, 129, 4001):
        buffer = layout.slice_buffer(torch.empty(rows, 3, dtype=torch.bfloat16, device="meta"), 512)
        assert buffer.shape == (rows, 512) and buffer.is_contiguous() and buffer.dtype == torch.bfloat16
        for tile in tiles:
            assert launch.blocks(rows, tile) * tile * 512 * 2 <= buffer.untyped_storage().nbytes()


class _Pair(NamedTuple):
    first: torch.Tensor
    others: tuple


class _Kernel:
    """Counts Triton's lookups; its compiled kernels record what they are launched with."""

    arg_names = ("begin", "end", "x", "stride", "ROWS", "FLAG")

    def __init__(self):
        self.lookups, self.launches = 0, []

    def __getitem__(self, grid):
        def look_up(*values, **constants):
            assert constants.pop("num_warps") == 4
            self.lookups += 1
            arguments = (*values, *(constants[name] for name in self.arg_names[len(values) :]))
            self.launches.append((grid, arguments))
            return compiled

        launches = self.launches

        class compiled:
            def __class_getitem__(cls, grid):
                def launched(*arguments, stream):
                    assert stream == 7
                    launches.append((grid, arguments))

                return launched

        return look_up


def test_a_kernel_is_looked_up_once_for_slices_that_compile_alike():
    kernel, x = _Kernel(), torch.ones(3)
    descriptor = object()
    x_and_others = _Pair(x, (x, None, descriptor))
    run = launch.SliceLaunch(
        kernel, lambda columns: (columns // 16, 1, 1), x_and_others, 64, FLAG=True, ROWS=32, num_warps=4
    )
    slices = [(0, 256), (256, 512), (512, 768), (768, 777), (1024, 1033), (1, 16), (0, 1)]
    driver = mock.Mock(get_current_device=lambda: 1, get_current_stream=lambda device: 6 + device)
    with mock.patch.object(launch.triton.runtime, "driver", mock.Mock(active=driver)):
        for begin, end in slices:
            run(begin, end)
    assert kernel.lookups == 4  # divisible by 16 or not, and 1
    assert [(grid, values[:2]) for grid, values in kernel.launches] == [
        (((end - begin) // 16, 1, 1), (begin, end)) for begin, end in slices
    ]
    assert {values[3:] for _, values in kernel.launches} == {(64, 32, True)}
    by_address = [values[2] for _, values in kernel.launches if values[2] is not x_and_others]
    address = x.data_ptr()
    assert by_address == [(address, (address, None, descriptor))] * (len(slices) - 4)


def test_the_number_of_columns_is_worked_out_once():
    layout._slice_columns.cache_clear()
    with mock.patch.object(launch, "blocks", side_effect=launch.blocks) as blocks:
        asked = 777, 896, launch.SIXTEEN_BIT[90], 132, 2**24
        first = layout._slice_columns(*asked)
        worked = blocks.call_count
        assert layout._slice_columns(*asked) == first and blocks.call_count == worked

"""What Triton makes of the head's launches for GPUs that are not there: no spills, shared memory, matrix instructions.

A choice of launches, for time; benchmarks/compile_report.py compiles all of them.
"""

import pytest
import torch

pytest.importorskip("triton")
from compiling import compile_kernels  # noqa: E402
from head_launches import is_matmul, launches_of, name_of  # noqa: E402

MATMULS = ("_score_kernel, LogSumExp", "_score_kernel, LogitGradient", "_d_weight_kernel", "_d_hidden_kernel")
CHOICE = {  # compute capability -> (case, kernels that differ from those of the cases before)
    90: [
        ({}, (*MATMULS, "_merge_kernel")),
        ({"frozen": True, "bias": True, "softcap": 30.0}, (MATMULS[0], "_raise_kernel", "_finish_kernel")),
    ],
    80: [({}, MATMULS)],
    100: [({}, MATMULS)],
}


@pytest.mark.parametrize("cc", CHOICE)
def test_shipped_launches(cc):
    chosen = []
    for case, names in CHOICE[cc]:
        found = [x for x in launches_of(cc, "fused", **case) if name_of(x) in names]
        assert {name_of(x) for x in found} == set(names)
        chosen += found
    for compiled in compile_kernels(chosen):
        compiled.check(matmul=is_matmul(compiled.launch))


@pytest.mark.parametrize("cc", CHOICE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_each_other(cc, dtype):
    """Slices and buffers are multiples of 256 columns, and hold whole tiles."""
    from amopo_kernels.head import launch

    tiles = launch.FLOAT32 if dtype == torch.float32 else launch.SIXTEEN_BIT[cc]
    assert 256 % tiles.scores.columns == 0 and 256 % tiles.d_weight.rows == 0 and 256 % tiles.d_hidden.depth == 0

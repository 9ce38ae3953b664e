"""What Triton makes of the head's launches for GPUs that are not there: no spills, shared memory, matrix instructions.

A choice of launches, for time; benchmarks/compile_report.py compiles all of them.
"""

import pytest
import torch

pytest.importorskip("triton")
from compiling import compile_kernels  # noqa: E402
from head_launches import is_matmul, launches_of, name_of  # noqa: E402

FORWARD = "_score_kernel, LogSumExp"
BACKWARD = ("_score_kernel, LogitGradient", "_d_weight_kernel", "_d_hidden_kernel")
ALL_OPTIONS = {"frozen": True, "bias": True, "softcap": 30.0}
CHOICE = [  # (compute capability, case, kernels that differ from those of the cases before)
    (90, {}, (*BACKWARD, "_merge_kernel")),
    (90, ALL_OPTIONS, (FORWARD, "_raise_kernel", "_finish_kernel")),
    (80, {}, (FORWARD, *BACKWARD)),
    (100, {}, BACKWARD),
    # Less than what compiles above: the frozen forward has the plain one's loop, the gradient's is the same again.
    pytest.param(90, {}, (FORWARD,), marks=pytest.mark.slow),
    pytest.param(100, {}, (FORWARD,), marks=pytest.mark.slow),
    pytest.param(100, ALL_OPTIONS, (FORWARD, "_raise_kernel", "_finish_kernel"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("cc", "case", "names"), CHOICE)
def test_shipped_launches(cc, case, names):
    chosen = [x for x in launches_of(cc, "fused", **case) if name_of(x) in names]
    assert {name_of(x) for x in chosen} == set(names)
    for compiled in compile_kernels(chosen):
        compiled.check(matmul=is_matmul(compiled.launch))


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_each_other(cc, dtype):
    """Slices and buffers are multiples of 256 columns, and hold whole tiles."""
    from amopo_kernels.head import launch

    tiles = launch.FLOAT32 if dtype == torch.float32 else launch.SIXTEEN_BIT[cc]
    assert 256 % tiles.scores.columns == 0 and 256 % tiles.d_weight.rows == 0 and 256 % tiles.d_hidden.depth == 0

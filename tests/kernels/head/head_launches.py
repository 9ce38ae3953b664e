"""Every launch of the head's kernels, recorded from the code that makes them, to compile for GPUs that are not there.

The order of work runs on meta tensors of real sizes with the configuration of a compute capability; a recorder stands
in for each kernel. So a launch that is shipped is a launch that is compiled.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from compiling import Descriptor, Launch
from triton.tools.tensor_descriptor import TensorDescriptor

from amopo_kernels.head import (
    chunked,
    kept_probabilities,
    launch,
    layout,
    merge_strips,
    passes,
    score_loop,
    slice_gradients,
    warp_specialized,
)
from amopo_kernels.head.options import Options
from amopo_kernels.head.problem import Gradients, Problem

MODULES = (score_loop, warp_specialized, slice_gradients, chunked, kept_probabilities, merge_strips)
OPTIONS = ("num_warps", "num_stages")
ALL_OUTPUTS = "entropy,lse,mean_logit,top1,log_sum_p2"
# name -> what the case asks of the head
CASES = {
    "exact": {},
    "all options": {"bias": True, "softcap": 30.0, "outputs": ALL_OUTPUTS},
    "all outputs and a bias": {"bias": True, "outputs": ALL_OUTPUTS},
    "cached": {"cached": True, "bias": True, "softcap": 30.0},
    "cached, outputs": {"cached": True, "outputs": ALL_OUTPUTS},
    "frozen": {"frozen": True},
    "frozen, all options": {"frozen": True, "bias": True, "softcap": 30.0},
    "temperatures and ignored rows": {"counted": True},
    "frozen, temperatures and ignored rows": {"counted": True, "frozen": True, "softcap": 30.0},
    "a bias": {"bias": True},
    "float16": {"dtype": torch.float16},
    "float16, a bias": {"dtype": torch.float16, "bias": True},
    "float32": {"dtype": torch.float32},
    "few rows": {"rows": 512, "features": 896},
    "rows that no descriptor can read": {"features": 900},
    "eight features": {"rows": 64, "features": 8},
    "warp-specialised": {"specialised": True},
    "warp-specialised, all options": {"specialised": True, "softcap": 30.0, "outputs": "entropy,lse,mean_logit,top1"},
    "warp-specialised, float16, a bias": {"specialised": True, "dtype": torch.float16, "bias": True},
    "warp-specialised, cached": {"specialised": True, "cached": True, "softcap": 30.0},
    "warp-specialised, frozen": {"specialised": True, "frozen": True},
    "warp-specialised, temperatures and ignored rows": {"specialised": True, "counted": True},
}
# For sm_90 alone: numbers that 16 does not divide or that are 1, and dX32 added to in L2
EDGES = {
    "one row": {"rows": 1},
    "one row, frozen": {"rows": 1, "frozen": True},
    "one row, all options": {"rows": 1, "bias": True, "softcap": 30.0, "outputs": ALL_OUTPUTS},
    "one row, all outputs": {"rows": 1, "bias": True, "outputs": ALL_OUTPUTS},
    "one row, frozen, all options": {"rows": 1, "frozen": True, "bias": True, "softcap": 30.0},
    "ragged rows, a bias": {"rows": 4001, "bias": True},
    "ragged rows and vocabulary, float16": {"rows": 4001, "vocabulary": 50257, "bias": True, "dtype": torch.float16},
    "ragged rows and vocabulary, all outputs": {
        "rows": 4001, "vocabulary": 50257, "bias": True, "outputs": ALL_OUTPUTS,
    },
    "ragged rows and vocabulary": {"rows": 4001, "vocabulary": 50257, "cached": True, "bias": True},
    "ragged rows and vocabulary, frozen": {"rows": 4001, "vocabulary": 50257, "frozen": True},
    "one row, warp-specialised": {"specialised": True, "rows": 1, "vocabulary": 50257},
}


class _Recorder:
    def __init__(self, module, name: str, kernel, launches: list, cc: int):
        self.kernel, self.launches, self.cc = kernel, launches, cc
        self.name = f"{module.__name__}:{name}"

    def __getitem__(self, grid):
        def record(*values, **keywords):
            options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
            arguments = dict(zip(self.kernel.arg_names, values, strict=False)) | keywords
            arguments = {name: _recorded(value) for name, value in arguments.items()}
            self.launches.append(Launch(self.name, arguments, cc=self.cc, **options))

        return record


def _recorded(value):
    if hasattr(value, "block_shape"):
        gluon = not isinstance(value, TensorDescriptor)
        return Descriptor(value.base.dtype, tuple(value.shape), tuple(value.block_shape), gluon)
    if isinstance(value, tuple):
        return type(value)(*map(_recorded, value))
    return value.dtype if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def recording(cc: int, dtype: torch.dtype, specialised: bool = False):
    launches: list[Launch] = []
    configuration = launch.FLOAT32 if dtype == torch.float32 else launch.SIXTEEN_BIT[cc]
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    stack.enter_context(
                        mock.patch.object(module, name, _Recorder(module, name, kernel, launches, cc))
                    )
        stack.enter_context(mock.patch.object(launch, "INTERPRETED", False))
        stack.enter_context(mock.patch.object(launch, "tiles", lambda device, dtype: configuration))
        stack.enter_context(mock.patch.object(score_loop, "WARP_SPECIALIZED", specialised))
        stack.enter_context(mock.patch.object(launch, "processors", lambda device: 132))
        yield launches


def launches_of(
    cc: int, backend: str, *, dtype=torch.bfloat16, features=5120, bias=False, softcap=None, outputs="",
    cached=False, frozen=False, counted=False, specialised=False, rows=4096, vocabulary=152064,
) -> list[Launch]:  # fmt: skip
    """The distinct launches of a forward and a backward of case A, or what is asked for."""
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden = empty(rows, features)
    with recording(cc, dtype, specialised) as launches:
        columns = layout.slice_columns(hidden, dtype, backend) * 2 if cached else 0
        mode = "frozen" if frozen else "cached" if cached else "exact"
        options = Options(
            softcap, 1.0, None, outputs, dtype, backend, mode, rows * dtype.itemsize * columns, False, False
        )
        per_row = ()
        if counted:
            per_row = (empty(rows, dtype=torch.float32), None, empty((), dtype=torch.int32))
        problem = Problem(
            hidden, empty(vocabulary, features), empty(vocabulary) if bias else None, empty(rows, dtype=torch.int64),
            options, *per_row,
        )  # fmt: skip
        forward = passes.forward(problem)
        if not frozen:
            per_gradient = [empty(rows, dtype=torch.float32) for _ in range(4 if outputs else 1)]
            passes.backward(
                problem, forward, Gradients(*per_gradient), need_hidden=True, d_weight=empty(vocabulary, features),
                d_bias=empty(vocabulary) if bias else None,
            )  # fmt: skip
    distinct = {}
    for found in launches:
        key = (found.kernel, *((name, _compiled_in(name, value)) for name, value in found.arguments.items()))
        distinct.setdefault(key, found)
    return list(distinct.values())


def _compiled_in(name: str, value):
    """Of a slice's begin and end Triton compiles in whether they are 1 and whether 16 divides them."""
    return (value == 1, value % 16 == 0) if name in ("begin", "end") else value


def name_of(found: Launch) -> str:
    """The kernel's, with what its epilogue is."""
    name = found.kernel.split(":")[1]
    return f"{name}, {type(found.arguments['epilogue']).__name__}" if "epilogue" in found.arguments else name


def is_matmul(found: Launch) -> bool:
    return "DEPTH" in found.arguments

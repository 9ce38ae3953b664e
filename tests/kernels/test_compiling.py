"""The compile checks find what they are there to find."""

import pytest
import torch
from compiling import Descriptor, Launch, compile_kernels


def launch(cc, M=128, N=128, BLOCK_K=64, dtype=torch.bfloat16, num_warps=8, num_stages=3, tma=False):
    operand = [dtype, dtype]
    if tma:
        operand = [Descriptor(dtype, (M, 896), (M, BLOCK_K)), Descriptor(dtype, (N, 896), (N, BLOCK_K))]
    names = ("a", "b") if tma else ("a_ptr", "b_ptr")
    arguments = dict(zip(names, operand, strict=True)) | {"c_ptr": torch.float32, "K": 896}
    return Launch(
        f"kernels_for_tests:{'matmul_tma' if tma else 'matmul'}", arguments | {"M": M, "N": N, "BLOCK_K": BLOCK_K},
        cc=cc, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


FITS = [launch(80), launch(90), launch(90, tma=True), launch(100)]
DOES_NOT = {
    "spills": launch(90, N=256, BLOCK_K=32, num_warps=4, num_stages=1),  # 256 accumulators per thread
    "shared memory": launch(90, num_stages=8),
    "matrix instructions": launch(90, M=16, num_warps=4),  # wgmma needs 64 rows
}


def test_kernels_are_compiled_and_judged():
    compiled = compile_kernels([*FITS, *DOES_NOT.values()])
    for one in compiled[: len(FITS)]:
        one.check(matmul=True)
        assert one.registers > 64 and one.shared_bytes > 0
        assert one.wgmma == (one.launch.cc == 90)
    for one, message in zip(compiled[len(FITS) :], DOES_NOT, strict=True):
        with pytest.raises(AssertionError, match=message):
            one.check(matmul=True)


def test_a_compile_error_is_raised():
    with pytest.raises(RuntimeError, match="compiling failed"):
        compile_kernels([launch(90, M=100)])

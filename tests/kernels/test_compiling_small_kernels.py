"""The kernels that are not matmuls compile for every architecture: no spills, wide loads, no atomics."""

import re

import pytest

pytest.importorskip("triton")
from compiling import compile_kernels  # noqa: E402
from small_launches import small_launches  # noqa: E402


def test_small_kernels():
    """Every one of a kind is compiled for sm_90, the first for the others; compile_report.py compiles all."""
    launches = [(kind, launch) for cc in (80, 90, 100) for kind, found in small_launches(cc).items()
                for launch in (found if cc == 90 else found[:1])]  # fmt: skip
    for (kind, _), compiled in zip(launches, compile_kernels([launch for _, launch in launches]), strict=True):
        compiled.check(matmul=False)
        assert not re.search(r"\b(atom|red)\.", compiled.ptx), compiled.launch
        if kind == "rows":  # 4 columns of bf16 or float32 per thread are one load: 8 or 16 bytes
            assert "ld.global.v2" in compiled.ptx or "ld.global.v4" in compiled.ptx

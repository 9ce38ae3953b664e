"""Numbers and functions inside the Triton kernels of several operations."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]; tl.log is exact only to 2^-22 absolute near 1, which is no digit of a small x."""
    s = x / (2 + x)
    s2 = s * s
    series = 2 * s * (1 + s2 * (0.33333333 + s2 * (0.2 + s2 * (0.14285714 + s2 * 0.11111111))))
    return tl.where(x < 0.5, series, tl.log(1 + x))

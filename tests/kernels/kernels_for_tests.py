"""Kernels for the tests of the compile checks: one matmul, with pointers and with tensor descriptors."""

import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :], mask=start + k[None, :] < K, other=0.0)
        b = tl.load(b_ptr + n[:, None] * K + start + k[None, :], mask=start + k[None, :] < K, other=0.0)
        total = tl.dot(a, b.T, total)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def matmul_tma(a, b, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        total = tl.dot(a.load([0, start]), b.load([0, start]).T, total)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def of_a_slice(begin, end, matrix, pair, scale, missing, one, rows, wide, BLOCK: tl.constexpr):
    """Every kind of argument that the head's kernels have."""
    values = matrix.load([0, begin]).to(tl.float32) * scale + one
    if missing is not None:
        values += tl.load(missing)
    r, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (begin + c < end)[None, :]
    inner, more = pair
    tl.store(inner[0] + r[:, None] * more + c[None, :] + wide, values, mask=inside)

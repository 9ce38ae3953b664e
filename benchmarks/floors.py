"""FLOP and bytes of every way through the head, and the times that follow on an H200. Nothing here is measured.

U = N V H multiply-adds; one matmul is 2 U FLOP. Bytes are device-memory traffic at N = 4096: slices of 4096 columns in
`chunked`, whose dS stays in L2 (32 of 60 MB), of 16384 in `fused`, whose dS does not. `serial` are the bytes of passes
that no matmul overlaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from head_problem import Case

MATMUL = 790e12  # FLOP/s, bf16: an 8192^3 product on random data, one H200 (its copies ran at 4.3e12 bytes/s)
MEMORY = 4.8e12  # bytes/s, the vendor's figure
# Assumed rates at the head's shapes, as in docs/kernels.md; to be replaced by measurements.
TRITON, VENDOR = 690e12, 760e12
FUSED_SLICE, CHUNKED_SLICE = 16384, 4096  # columns
DS = 2 + 2 + 2  # bytes a logit of dS that leaves L2: written, read for dW and for dX
STRIP = 64  # columns per float32 log-sum-exp that the fused forward writes and reads again
ROW_GROUP = 2048  # rows for which the fused forward reads the weight once


@dataclasses.dataclass(frozen=True)
class Path:
    name: str
    matmuls: int  # of 2 U FLOP each
    triton: bool
    bytes: Callable[[Case], float]
    serial: Callable[[Case], float] = lambda case: 0.0

    def floor_ms(self, case: Case) -> float:
        return 1e3 * self.matmuls * 2 * case.N * case.H * case.V / MATMUL

    def memory_ms(self, case: Case) -> float:
        return 1e3 * self.bytes(case) / MEMORY

    def predicted_ms(self, case: Case) -> float:
        """Matmuls at their rate, or the memory traffic if that takes longer, and the serial passes behind them."""
        matmuls = self.floor_ms(case) * MATMUL / (TRITON if self.triton else VENDOR)
        serial = 1e3 * self.serial(case) / MEMORY
        return max(matmuls, self.memory_ms(case) - serial) + serial


def weight(case: Case) -> float:
    return 2.0 * case.V * case.H


def logits(case: Case) -> float:
    return float(case.N * case.V)


def slices(case: Case, columns: int) -> float:
    """What every slice of the backward moves besides the weight: X twice (dS, dW), dX32 read and written."""
    return case.V / columns * (2 * 2 + 8) * case.N * case.H


def frozen_slices(case: Case, columns: int) -> float:
    """The same of a frozen head, which has no dW."""
    return case.V / columns * (2 + 8) * case.N * case.H


def fused_forward(case: Case) -> float:
    return -(-case.N // ROW_GROUP) * weight(case) + 2 * 4 * logits(case) / STRIP


def backward(case: Case, columns: int) -> float:
    return 2 * weight(case) + slices(case, columns)  # W for the scores and, from L2, for dX; dW written


def fused(case: Case) -> float:
    return fused_forward(case) + backward(case, FUSED_SLICE) + DS * logits(case)


PATHS = [
    Path("fused, exact", 4, True, fused),
    Path("fused, cached", 3, True, lambda c: fused(c) + 4 * logits(c), lambda c: 4 * logits(c)),
    Path("fused, frozen head", 2, True, lambda c: weight(c) + frozen_slices(c, FUSED_SLICE) + (DS - 2) * logits(c)),
    # Logits are written (4) and read (4) in both directions, dS is written (2); reads and dS are passes of their own.
    Path("chunked, exact", 4, False, lambda c: weight(c) + backward(c, CHUNKED_SLICE) + 18 * logits(c),
         lambda c: 10 * logits(c)),
    Path("chunked, frozen head", 2, False,
         lambda c: weight(c) + frozen_slices(c, CHUNKED_SLICE) + 10 * logits(c), lambda c: 6 * logits(c)),
    # bf16 logits 2, to float32 2 + 4, log-softmax 4 + 4; backward: fill 4, 8 + 4, to bf16 4 + 2, read by two matmuls 4.
    Path("plain logits", 3, False, lambda c: 4 * weight(c) + 42 * logits(c), lambda c: 36 * logits(c)),
]  # fmt: skip

"""The AdamW update of update.py in one Triton kernel: states decoded, updated, encoded, weights rounded, in registers.

A program owns ROWS quantisation blocks of BLOCK elements each:

    read g, p, codes and scales of m and v -> AdamW in float32 -> new block maxima -> codes by arithmetic and a table
    -> write codes, scales and p, rounded with 16 Philox bits an element (one draw of 128 bits serves eight)

A code is guessed from the dynamic map's form: its 2^j values of a decade are the middles of as many equal parts of
10^-k * (0.1..1), and zero and the values of the decades below are as many as those (without a sign one less). So with
x = |y| 10^k in 0.1..1, counted from zero,

    the code of |y|, or the one below it = floor(2^j (1 + (x - 0.1) / 0.9) - lead)      0.2 < lead < 1

in whichever of two decades a y at their border is put: the middle between their values is 0.2 parts above the border.
One comparison with the float32 threshold between the two codes, which `code_table` finds exactly, decides. A search in
the map, which this replaced, took ten dependent loads of up to 32 places each.

It moves 8 bytes per element and state byte twice: bfloat16 weights and gradients with 4-bit states cost 8.1 bytes,
with 8-bit states 10.1, with float32 states 22; nothing is allocated. The random bits depend on (seed, element) alone.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from amopo_fast.optim.states import BLOCK_SIZE, MOMENTS, Moment, quantisation_map
from amopo_fast.optim.update import Step

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform; update.py serves
    triton = None

TILE = 1024  # elements of a program
NUM_WARPS = 8  # 4 elements a thread: 32 to 48 registers, nothing on the stack (benchmarks/compile_report.py)


def eligible(parameter: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether `update_` serves this parameter; elsewhere update.update_ does the same."""
    moments = state.get(MOMENTS[0])
    return (
        triton is not None
        and parameter.is_cuda
        and parameter.dtype in (torch.float32, torch.bfloat16)
        and (moments is None or moments.dtype == torch.float32)
    )


if triton is not None:

    @triton.jit
    def _decode(
        codes_ptr, scale_ptr, table_ptr, row, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
    ):
        # (ROWS, BLOCK) float32
        element = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        if BITS == 32:
            values = tl.load(codes_ptr + element, mask=inside, other=0.0)
        else:
            blocks = tl.max(inside.to(tl.int32), 1) > 0
            if BITS == 8:
                codes = tl.load(codes_ptr + element, mask=inside, other=0)
            else:
                byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
                pairs = tl.load(codes_ptr + byte, mask=blocks[:, None], other=0)
                codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), (ROWS, BLOCK))
            scale = tl.load(scale_ptr + row, mask=blocks, other=0.0)
            values = tl.load(table_ptr + codes.to(tl.int32)) * scale[:, None]
        return values

    @triton.jit
    def _encode(
        x, codes_ptr, scale_ptr, table_ptr, row, inside,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr,
    ):  # fmt: skip
        if BITS == 32:
            tl.store(codes_ptr + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], x, mask=inside)
        else:
            blocks = tl.max(inside.to(tl.int32), 1) > 0
            scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
            tl.store(scale_ptr + row, scale, mask=blocks)
            y = x / scale[:, None]
            codes = _code(y, table_ptr, BITS, SIGNED)
            if BITS == 8:
                at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
                tl.store(codes_ptr + at, codes.to(tl.uint8), mask=inside)
            else:
                even, odd = tl.split(tl.reshape(codes, (ROWS, BLOCK // 2, 2)))
                at = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
                tl.store(codes_ptr + at, ((even << 4) | odd).to(tl.uint8), mask=blocks[:, None])

    @triton.jit
    def _to_first_decade(x, parts, PLACES: tl.constexpr):
        small = x < 10.0**-PLACES
        return tl.where(small, x * 10.0**PLACES, x), tl.where(small, parts * 2.0**-PLACES, parts)

    @triton.jit
    def _code(y, table_ptr, BITS: tl.constexpr, SIGNED: tl.constexpr):
        """int32 codes of y, (ROWS, BLOCK) float32 from -1 to 1; 0 of NaN, whose guess is clamped as a whole number: a
        maximum of floats may hand NaN on, and what it is as a whole number lies outside of the table."""
        if BITS == 4 and not SIGNED:  # i / 16 from 1 / 16 on
            guess = tl.maximum((y * 16 - 0.75).to(tl.int32), 0)
        else:
            x = tl.abs(y)
            parts = tl.full(y.shape, 1 << (BITS - 2 if SIGNED else BITS - 1), tl.float32)
            x, parts = _to_first_decade(x, parts, 4)
            x, parts = _to_first_decade(x, parts, 2)
            x, parts = _to_first_decade(x, parts, 1)
            lead: tl.constexpr = 0.25 if SIGNED else 1.25  # without a sign a decade has one code less below it
            guess = tl.maximum((parts * (x * (1 / 0.9) + 0.8 / 0.9) - lead).to(tl.int32), 0)
            if SIGNED:
                code_of_zero: tl.constexpr = (1 << (BITS - 1)) - 1
                guess = tl.maximum(code_of_zero + (guess ^ (y.to(tl.int32, bitcast=True) >> 31)), 0)
        above = y >= tl.load(table_ptr + (1 << BITS) + guess)
        return tl.where(y == y, guess + above.to(tl.int32), 0)

    @triton.jit
    def _noise(seed, row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        # (ROWS, BLOCK) int32 in [0, 2^16): eight elements share one Philox draw
        draw = row[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        a, b, c, d = tl.randint4x(seed, draw.to(tl.int32))
        words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
        return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (ROWS, BLOCK))

    @triton.jit(do_not_specialize=["seed", "first_row"])
    def _adamw_kernel(
        p_ptr,  # (numel,) float32 or bfloat16
        g_ptr,  # (numel,)
        m_ptr, m_scale_ptr, m_table_ptr,  # codes (numel * BITS / 8 bytes), (numel / BLOCK,), of `code_table`
        v_ptr, v_scale_ptr, v_table_ptr,
        grad_scale_ptr,  # () float32
        numel,
        seed,
        first_row,  # quantisation blocks of the parameter before p
        lr, lr_decay, weight1, weight2, correction1, correction2_sqrt, eps,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
        HAS_GRAD_SCALE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        count = numel
        if HAS_GRAD_SCALE:
            scale = tl.load(grad_scale_ptr)
            count = tl.where(scale == scale, numel, 0)  # nothing is written where it is NaN
        inside = at < count
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GRAD_SCALE:
            g *= scale
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = _decode(m_ptr, m_scale_ptr, m_table_ptr, row, inside, ROWS, BLOCK, BITS)
        v = _decode(v_ptr, v_scale_ptr, v_table_ptr, row, inside, ROWS, BLOCK, BITS)
        p -= lr_decay * p
        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        _encode(m, m_ptr, m_scale_ptr, m_table_ptr, row, inside, ROWS, BLOCK, BITS, True)
        _encode(v, v_ptr, v_scale_ptr, v_table_ptr, row, inside, ROWS, BLOCK, BITS, False)
        p -= lr * (m / correction1) / (tl.sqrt(v) / correction2_sqrt + eps)
        if STOCHASTIC:
            bits = p.to(tl.int32, bitcast=True) + _noise(seed, first_row + row, ROWS, BLOCK)
            # CUDA's NaN is 0x7fffffff: noise would carry it over the sign bit and leave -0
            p = tl.where(p == p, (bits & -65536).to(tl.float32, bitcast=True), float("nan"))
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)


def launch_options(moment_kind: str) -> dict[str, int]:
    """Constexprs of the kernel for "fp32", "8bit" or "4bit" states."""
    block = BLOCK_SIZE.get(moment_kind, 256)
    return {"ROWS": TILE // block, "BLOCK": block, "BITS": {"fp32": 32, "8bit": 8, "4bit": 4}[moment_kind]}


@functools.cache
def code_table(states: str, signed: bool, device: torch.device) -> Tensor:
    """(2, 2^BITS) float32: the value of each code, and the smallest y that gets a code above it (the last: infinity).

    A y between two values gets the upper one where y - lower >= (upper - lower) / 2, all in float32 (`Moment.write`);
    that holds from one float32 on.
    """
    values = quantisation_map(states, signed, torch.device("cpu"))
    lower, half = values[:-1], (values[1:] - values[:-1]) * 0.5
    first = lower + half
    for _ in range(4):  # whose rounding is off by a few float32 at most
        below = first.nextafter(-torch.ones(()))
        first = torch.where(below - lower >= half, below, first)
        first = torch.where(first - lower >= half, first, first.nextafter(torch.ones(())))
    return torch.stack([values, torch.cat([first, torch.tensor([math.inf])])]).to(device)


@torch.no_grad()
def update_(
    parameter: Tensor,  # (n,) float32 or bfloat16
    grad: Tensor,  # (n,)
    exp_avg: Moment,
    exp_avg_sq: Moment,
    step: Step,
    grad_scale: Tensor | None = None,  # () float32; NaN: leave everything as it is
    first: int = 0,  # of the elements given, in the whole parameter; a multiple of TILE
) -> None:
    """Update parameter and moments in place; update.update_ but for the random bits drawn."""
    options = launch_options(exp_avg.states)
    pointers = []
    for moment in (exp_avg, exp_avg_sq):
        quantised = moment.scale is not None
        # Without quantisation the scale and table pointers are never read.
        table = code_table(moment.states, moment.signed, grad.device) if quantised else grad
        pointers += [moment.codes, moment.scale if quantised else grad, table]
    with torch.cuda.device_of(parameter):  # Triton launches on the current device
        _adamw_kernel[(triton.cdiv(parameter.numel(), TILE),)](
            parameter,
            grad,
            *pointers,
            grad if grad_scale is None else grad_scale,
            parameter.numel(),
            step.seed or 0,
            first // options["BLOCK"],
            step.lr,
            step.lr * step.weight_decay,
            1 - step.beta1,
            1 - step.beta2,
            step.bias_correction1,
            step.bias_correction2_sqrt,
            step.eps,
            **options,
            HAS_GRAD_SCALE=grad_scale is not None,
            STOCHASTIC=step.seed is not None,
            num_warps=NUM_WARPS,
        )

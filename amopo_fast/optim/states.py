"""Storage of AdamW's two moments: float32, or 8-bit and 4-bit codes with a float32 scale per block.

    scale = max |x| over a block        code = the map's value nearest to x / scale (halfway: the upper)

Block sizes and maps are those of torchao's AdamW8bit (blocks of 256; Dettmers et al. 2022, arXiv 2110.02861) and
AdamW4bit (blocks of 128; Li et al. 2023, arXiv 2309.01507), bit for bit, kept as plain tensors so that a checkpoint
holds nothing but tensors. As there, a tensor of fewer than 4096 elements or of no whole number of blocks is not
quantised; here it then stays in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = {"8bit": 256, "4bit": 128}
MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST_QUANTISED = 4096  # elements


def storage(numel: int, states: str) -> str:
    """ "fp32", "8bit" or "4bit": how a tensor of `numel` elements keeps its moments when `states` is asked for."""
    if states == "fp32" or numel < SMALLEST_QUANTISED or numel % BLOCK_SIZE[states]:
        return "fp32"
    return states


def layout_of(
    numel: int, states: str, values_dtype: torch.dtype = torch.float32
) -> dict[str, tuple[int, torch.dtype]]:
    """Name -> (elements, dtype) of the tensors that hold the moments of a tensor of `numel` elements."""
    kind = storage(numel, states)
    if kind == "fp32":
        return dict.fromkeys(MOMENTS, (numel, values_dtype))
    layout = {}
    for name in MOMENTS:
        layout[f"{name}_codes"] = (numel if kind == "8bit" else numel // 2, torch.uint8)
        layout[f"{name}_scale"] = (numel // BLOCK_SIZE[kind], torch.float32)
    return layout


def moment_bytes(numel: int, states: str) -> int:
    """Bytes of both moments of a tensor of `numel` elements."""
    return sum(count * dtype.itemsize for count, dtype in layout_of(numel, states).values())


@functools.cache
def quantisation_map(states: str, signed: bool, device: torch.device) -> Tensor:
    """(256,) or (16,) float32, ascending: the value of each code, between -1 and 1.

    The dynamic map of arXiv 2110.02861, section 2.2, but for the second moment in 4 bits, whose map is i / 16 for
    i = 1..16: linear, and without the zero that would be a denominator (arXiv 2309.01507).
    """
    if states == "4bit" and not signed:
        return torch.arange(1, 17, dtype=torch.float32, device=device) / 16
    return _dynamic_map(8 if states == "8bit" else 4, signed).to(device)


def _dynamic_map(bits: int, signed: bool) -> Tensor:
    """0, 1, and in each of `bits` - 1 decades, from the largest down, half as many values as in the one above: the
    middles of equal parts of 0.1..1, times the decade's power of ten. Without a sign each decade has twice as many.

    float32 on the CPU, whose rounding makes the values torchao's own.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for exponent in range(bits - 1):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - bits + 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@dataclass(frozen=True)
class Moment:
    """One moment of a parameter, flat. `scale` is None for float32 storage, where `codes` holds the values."""

    codes: Tensor  # (n,) float32, (n,) uint8 or (n / 2,) uint8, even elements in the high half of a byte
    scale: Tensor | None  # (n / block size,) float32
    signed: bool

    @property
    def states(self) -> str:
        if self.scale is None:
            return "fp32"
        return "8bit" if self.codes.numel() // self.scale.numel() == BLOCK_SIZE["8bit"] else "4bit"

    @property
    def map(self) -> Tensor:
        return quantisation_map(self.states, self.signed, self.codes.device)

    def slice(self, begin: int, end: int) -> Moment:
        """Elements begin..end, both at block boundaries; a view."""
        if self.scale is None:
            return Moment(self.codes[begin:end], None, self.signed)
        block = BLOCK_SIZE[self.states]
        packed = 2 if self.states == "4bit" else 1
        return Moment(
            self.codes[begin // packed : end // packed], self.scale[begin // block : end // block], self.signed
        )

    def read(self) -> Tensor:
        """(n,) float32."""
        if self.scale is None:
            return self.codes
        codes = self.codes
        if self.states == "4bit":
            codes = torch.stack([codes >> 4, codes & 0b1111], -1).view(-1)
        return (self.map[codes.int()].view(self.scale.numel(), -1) * self.scale[:, None]).view(-1)

    def write(self, values: Tensor) -> None:
        """Store (n,) float32, in place."""
        if self.scale is None:
            self.codes.copy_(values)
            return
        blocks = values.view(self.scale.numel(), -1)
        scale = blocks.abs().amax(-1).clip(1e-12)  # of a block of zeros
        codes = _nearest((blocks / scale[:, None]).view(-1), self.map)
        if self.states == "4bit":
            codes = (codes[::2] << 4) | codes[1::2]
        self.codes.copy_(codes)
        self.scale.copy_(scale)


def _nearest(values: Tensor, ascending: Tensor) -> Tensor:
    """(n,) uint8: the code whose value is nearest, the upper one from halfway on."""
    below = (torch.searchsorted(ascending, values, right=True) - 1).clip(0)
    above = (below + 1).clip(max=len(ascending) - 1)
    upper = values - ascending[below] >= (ascending[above] - ascending[below]) * 0.5
    return torch.where(upper, above, below).to(torch.uint8)


def new_state(
    parameter: Tensor, states: str, values_dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Zeroed moments of a parameter as the plain tensors of an optimizer's state, on a device (default: its own)."""
    layout, device = layout_of(parameter.numel(), states, values_dtype), device or parameter.device
    return {name: torch.zeros(count, dtype=dtype, device=device) for name, (count, dtype) in layout.items()}


def moments_of(state: dict[str, Tensor]) -> tuple[Moment, ...]:
    """The two moments that `new_state` laid out."""
    if MOMENTS[0] in state:
        return tuple(Moment(state[name], None, name == MOMENTS[0]) for name in MOMENTS)
    return tuple(Moment(state[f"{name}_codes"], state[f"{name}_scale"], name == MOMENTS[0]) for name in MOMENTS)

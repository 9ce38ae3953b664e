"""Storage of AdamW's two moments: float32, or 8-bit and 4-bit codes with a float32 scale per block.

The codes, maps and block sizes are torchao's (8 bits: blocks of 256, arXiv 2110.02861; 4 bits: blocks of 128,
arXiv 2309.01507), kept as plain tensors so that a checkpoint holds nothing but tensors. As there, a tensor of fewer
than 4096 elements or of no whole number of blocks is not quantised; here it then stays in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = {"8bit": 256, "4bit": 128}
MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST_QUANTISED = 4096  # elements


def _torchao():
    try:
        import torchao.optim
    except ImportError:
        raise ImportError(
            "8-bit and 4-bit optimizer states need torchao: pip install 'amopo-fast[lowbit]', or use adamw"
        ) from None
    return torchao.optim


def storage(numel: int, states: str) -> str:
    """ "fp32", "8bit" or "4bit": how a tensor of `numel` elements keeps its moments when `states` is asked for."""
    if states == "fp32" or numel < SMALLEST_QUANTISED or numel % BLOCK_SIZE[states]:
        return "fp32"
    return states


def moment_bytes(numel: int, states: str) -> int:
    """Bytes of both moments of a tensor of `numel` elements."""
    kind = storage(numel, states)
    if kind == "fp32":
        return 8 * numel
    codes = numel if kind == "8bit" else numel // 2
    return 2 * (codes + 4 * (numel // BLOCK_SIZE[kind]))


@functools.cache
def quantisation_map(states: str, signed: bool, device: torch.device) -> Tensor:
    """(256,) or (16,) float32, ascending: the value of each code."""
    optim = _torchao()
    module = optim.subclass_8bit if states == "8bit" else optim.subclass_4bit
    values = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    return torch.tensor(values, dtype=torch.float32, device=device)


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
        return _torchao().quant_utils.dequant_with_qmap(codes, self.map, self.scale)

    def write(self, values: Tensor) -> None:
        """Store (n,) float32, in place."""
        if self.scale is None:
            self.codes.copy_(values)
            return
        utilities = _torchao().quant_utils
        scaled, scale = utilities.scale_tensor(values, BLOCK_SIZE[self.states])
        if self.states == "8bit":
            codes = utilities.quantize_8bit_with_qmap(scaled, self.map)
        else:
            codes = utilities.quantize_4bit_with_qmap(scaled, self.map)
            codes = (codes[::2] << 4) | codes[1::2]
        self.codes.copy_(codes)
        self.scale.copy_(scale)


def new_state(parameter: Tensor, states: str, values_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Zeroed moments of a parameter as the plain tensors of an optimizer's state, on its device."""
    numel, device = parameter.numel(), parameter.device
    kind = storage(numel, states)
    if kind == "fp32":
        return {name: torch.zeros(numel, dtype=values_dtype, device=device) for name in MOMENTS}
    state = {}
    for name in MOMENTS:
        packed = numel if kind == "8bit" else numel // 2
        state[f"{name}_codes"] = torch.zeros(packed, dtype=torch.uint8, device=device)
        state[f"{name}_scale"] = torch.zeros(numel // BLOCK_SIZE[kind], dtype=torch.float32, device=device)
    return state


def moments_of(state: dict[str, Tensor]) -> tuple[Moment, ...]:
    """The two moments that `new_state` laid out."""
    if MOMENTS[0] in state:
        return tuple(Moment(state[name], None, name == MOMENTS[0]) for name in MOMENTS)
    return tuple(Moment(state[f"{name}_codes"], state[f"{name}_scale"], name == MOMENTS[0]) for name in MOMENTS)

"""Launch configurations, by rule: compute capability and dtype; nothing is tuned at run time.

A tile of 128 x 256 float32 scores fills the accumulators of two warpgroups (128 registers a thread) and reads 3/256
bytes of bf16 operands per multiply-add from L2: the least that the register file allows without clusters of blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import direct_launch
from .problem import Problem

INTERPRETED = triton.knobs.runtime.interpret
Grid = tuple[int, int, int]
Slices = Callable[[int, int], None]  # does the columns from one to another
GROUP = 16  # row tiles that are walked together: 2048 rows, 20 MB of bf16 at H = 5120, stay in L2


@dataclass(frozen=True)
class Tile:
    """A block of a matmul's output, rows x columns, and its depth along the sum."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    per_processor: int = 1  # blocks that run on a processor at once, of the persistent grid


@dataclass(frozen=True)
class Configuration:
    scores: Tile  # hidden x weight^T: N x V
    d_weight: Tile  # dS^T x hidden: V x H
    d_hidden: Tile  # dS x weight: N x H
    descriptors: bool  # read operands through tensor descriptors (TMA)
    add_in_l2: bool = False  # to dX32, by TMA's reductions; sm_90 alone has room


def _uniform(tile: Tile, descriptors: bool) -> Configuration:
    return Configuration(tile, tile, tile, descriptors)


INTERPRETER = _uniform(Tile(32, 64, 32, 1, 1), descriptors=True)
SIXTEEN_BIT = {
    80: Configuration(
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), descriptors=False
    ),
    90: replace(_uniform(Tile(128, 256, 64, 8, 4), descriptors=True), add_in_l2=True),
    100: _uniform(Tile(128, 256, 64, 8, 4), descriptors=True),
}
# Operands that cannot be read in wide loads: their pointers and masks take registers.
UNALIGNED = _uniform(Tile(128, 128, 32, 8, 3), descriptors=False)
# On the CUDA cores, or in TF32 where torch allows it: correct, but a vendor matmul is faster.
FLOAT32 = Configuration(Tile(64, 64, 32, 4, 2, 3), Tile(64, 64, 32, 4, 2, 3), Tile(64, 32, 32, 4, 2, 3), False)


def table_key(capability: int) -> int:
    """The entry for a compute capability such as 89: the newest one that is not newer. 12.x has no tcgen05 and little
    shared memory, and takes that of 8.0."""
    return 80 if capability >= 120 else max(key for key in SIXTEEN_BIT if key <= capability)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def tiles(device: torch.device, dtype: torch.dtype) -> Configuration:
    if device.type != "cuda":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    return SIXTEEN_BIT[table_key(_device(device.index)[0])]


def configuration(problem: Problem) -> Configuration:
    """`tiles`, or what runs where the operands' addresses and sizes do not allow them."""
    found = tiles(problem.hidden.device, problem.hidden.dtype)
    if all(_wide(matrix, found.descriptors) for matrix in (problem.hidden, problem.weight)):
        return found
    return replace(found if found in (INTERPRETER, FLOAT32) else UNALIGNED, descriptors=False)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors: the size of a persistent grid."""
    return _device(device.index)[1] if device.type == "cuda" else 3


def grid(tile: Tile, device: torch.device, rows: int, columns: int) -> Grid:
    """Persistent: a program per tile of rows x columns, but not more than the device runs at a time."""
    count = blocks(rows, tile.rows) * blocks(columns, tile.columns)
    return min(count, processors(device) * tile.per_processor), 1, 1


def blocks(size: int, block: int) -> int:
    """How many blocks cover the size. triton.cdiv takes ten times as long."""
    return -(-size // block)


class SliceLaunch:
    """The launches of one kernel, `(begin, end, *arguments, constants)`, that differ in the slice of columns alone.

    For every launch Triton looks its compiled kernel up by all arguments, which takes longer than the launch where they
    are tuples of many, and asks the driver about each pointer. What it compiles in of an integer is whether 16 divides
    it and whether it is 1; after the first launch of a kind, the kernel is launched directly, by addresses of tensors
    that this keeps alive, on the stream that is current then. `direct_launch` leaves out the rest of Triton, too.
    """

    def __init__(self, kernel, grid: Callable[[int], Grid], *arguments, **constants):
        self._kernel, self._grid, self._arguments, self._constants = kernel, grid, arguments, constants
        self._bound: dict[tuple[bool, ...], Callable[[Grid], Slices]] = {}
        self._launches: dict[tuple[int, int, bool], Slices] = {}  # by columns and by what tells begin's and end's kind

    def __call__(self, begin: int, end: int) -> None:
        key = end - begin, begin % 16, begin == 1 or end == 1
        launch = self._launches.get(key)
        if launch is None:
            launch = self._first(key, begin, end)
        if launch is not None:
            launch(begin, end)

    def _first(self, key: tuple[int, int, bool], begin: int, end: int) -> Slices | None:
        """What launches a slice of this size and kind; None: Triton has launched it."""
        kind, grid = (begin % 16 == 0, end % 16 == 0, begin == 1, end == 1), self._grid(end - begin)
        bound = self._bound.get(kind) or self._known(kind)
        if bound is None:
            compiled = self._kernel[grid](begin, end, *self._arguments, **self._constants)
            if compiled is not None:  # as in the interpreter
                self._bound[kind] = self._bind(compiled, kind)
            return None
        self._bound[kind] = bound
        launch = self._launches[key] = bound(grid)
        return launch

    def _bind(self, compiled, kind: tuple[bool, ...]) -> Callable[[Grid], Slices]:
        if direct_launch.ENABLED:
            direct_launch.KERNELS[self._kinds, kind] = direct_launch.DirectKernel.of(compiled)
        values, (_, stream) = self._values, self._device

        def on(grid: Grid) -> Slices:
            runner = compiled[grid]
            return lambda begin, end: runner(begin, end, *values, stream=stream)

        return self._known(kind) or on

    def _known(self, kind: tuple[bool, ...]) -> Callable[[Grid], Slices] | None:
        """Through the driver alone, a kernel that an earlier call has launched through Triton."""
        if not direct_launch.ENABLED:
            return None
        kernel = direct_launch.KERNELS.get((self._kinds, kind))
        return None if kernel is None else kernel.bind([0, 0, *self._leaves], self._device[1])

    @functools.cached_property
    def _leaves(self) -> list:
        return direct_launch.leaves(self._arguments)

    @functools.cached_property
    def _kinds(self) -> tuple:
        """What Triton finds the compiled kernel by, but for begin and end."""
        device, _ = self._device
        return self._kernel, device, tuple(map(direct_launch.kind, self._leaves)), tuple(self._constants.items())

    @functools.cached_property
    def _values(self) -> list:
        """The arguments, and the constants that are the kernel's arguments, in its order."""
        constants = [self._constants[name] for name in self._kernel.arg_names[2 + len(self._arguments) :]]
        return [*map(_address, self._arguments), *constants]

    @functools.cached_property
    def _device(self) -> tuple[int, int]:
        """The current one, and its current stream."""
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        return device, driver.get_current_stream(device)


def _address(argument: Any) -> Any:
    """What a kernel that is compiled takes in the place of a tensor, or of those in a tuple."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return tuple(map(_address, argument)) if isinstance(argument, tuple) else argument


def matmul(configuration: Configuration, tile: Tile, dtype: torch.dtype) -> dict:
    """The arguments that all matmul kernels share. float32 multiplies in TF32 only if torch's own matmuls may."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return dict(
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=GROUP, DESCRIPTORS=configuration.descriptors,
        PRECISION="tf32" if tf32 else "ieee", num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def source(matrix: Tensor, block: tuple[int, int], descriptors: bool) -> Tensor | TensorDescriptor:
    """What `tiles.load_tile` reads."""
    if not descriptors:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def _wide(matrix: Tensor, descriptors: bool) -> bool:
    """Whether every row begins and ends at a multiple of 16 bytes, as tensor descriptors need it; for pointers, of 16
    elements, of which Triton tells its compiler."""
    unit = 16 // matrix.element_size() if descriptors else 16
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % unit == 0 and matrix.shape[1] % unit == 0

"""Launches by the CUDA driver itself, past Triton's launcher: off unless AMOPO_KERNELS_DIRECT_LAUNCH=1.

For every launch Triton's launcher checks and converts all arguments and encodes each tensor map anew. Here a kernel's
parameters lie in memory that is filled once a call; a launch changes two numbers of it. Their order is that of Triton's
own launchers: what is no constant, tuples flattened, a tensor descriptor as its map, shape (int32) and strides (int64),
then two addresses of scratch memory. The driver says each parameter's size, which must be the one that is filled.

Whatever does not fit is launched by Triton: its other versions, hooks of a profiler, scratch memory, clusters, types
that the head's kernels do not have, drivers before CUDA 12.4.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Iterator
from ctypes import POINTER, addressof, byref, c_int32, c_size_t, c_uint, c_void_p
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

Grid = tuple[int, int, int]
ENABLED = os.environ.get("AMOPO_KERNELS_DIRECT_LAUNCH") == "1"
VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")  # of Triton, whose order of parameters was read
MOST_SHARED_BYTES = 227 * 1024  # of a block on sm_90 and sm_100; above it Triton launches with more attributes
MAP_BYTES = 128  # of a CUtensorMap, and what it is aligned to here; the driver asks for 64
_L2_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, which Triton asks for
_DATA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
KERNELS: dict[tuple, DirectKernel | None] = {}  # by all that Triton compiles in
_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}  # of struct


class _Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *((name, c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", c_void_p), ("attributes", c_void_p), ("attribute_count", c_uint),
    ]  # fmt: skip


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """With the functions' argument types; None: absent, or too old."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuLaunchKernelEx.argtypes = [c_void_p] * 4
        driver.cuFuncGetParamInfo.argtypes = [c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)]
        driver.cuTensorMapEncodeTiled.argtypes = [c_void_p, c_uint, c_uint, *[c_void_p] * 5, *[c_uint] * 4]
        driver.cuCtxGetCurrent.argtypes = [POINTER(c_void_p)]
    except (OSError, AttributeError):
        return None
    return driver


def leaves(arguments: tuple) -> list:
    """What the tuples among arguments consist of, in order."""
    found: list = []
    for value in arguments:
        if isinstance(value, tuple):
            found += leaves(value)
        else:
            found.append(value)
    return found


def kind(value: Any) -> Any:
    """What Triton compiles in of a leaf: of an integer, whether it is 1 or 16 divides it, and how wide it is."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if hasattr(value, "block_shape"):  # a tensor descriptor, Triton's or Gluon's
        return value.base.dtype, *value.block_shape
    return type(value)


def _types(signature: tuple) -> Iterator[str]:
    for one in signature:
        if isinstance(one, tuple):
            yield from _types(one)
        else:
            yield one


class _Map(NamedTuple):
    """How a kernel reads a tensor descriptor: the block in shared memory and its swizzle."""

    block: tuple[int, ...]
    swizzle: int


@functools.lru_cache(1024)  # addresses recur
def _encoded(how: _Map, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The CUtensorMap of a matrix."""
    rank, element = len(shape), dtype.itemsize
    numbers = ctypes.c_uint64 * rank
    sizes, steps = numbers(*reversed(shape)), numbers(*(element * stride for stride in reversed(strides[:-1])))
    box, every = (c_uint * rank)(*reversed(how.block)), (c_uint * rank)(*[1] * rank)
    memory = ctypes.create_string_buffer(2 * MAP_BYTES)
    place = _aligned(memory)
    error = _driver().cuTensorMapEncodeTiled(
        place, _DATA_TYPES[dtype], rank, address, sizes, steps, box, every, 0, how.swizzle, _L2_128_BYTES, 0
    )
    if error:
        raise RuntimeError(f"CUDA cannot describe a matrix of {shape} with strides {strides}: error {error}")
    return ctypes.string_at(place, MAP_BYTES)


def _aligned(memory: ctypes.Array) -> int:
    """The first address in it that a map may have."""
    return -(-addressof(memory) // MAP_BYTES) * MAP_BYTES


class DirectKernel:
    """A compiled kernel whose first two arguments are int32, begin and end."""

    def __init__(self, compiled, sources: list[tuple[int, _Map | None]], parts: list[str]):
        metadata = compiled.metadata
        self.function, self._block = compiled.function, (32 * metadata.num_warps, 1, 1, metadata.shared)
        self._compiled = compiled  # which unloads its function when it goes
        self._sources = sources[2:]
        self._offsets, formats, end = [], "=", 0
        for part in parts:
            size = struct.calcsize("=" + part)
            offset = -(-end // size) * size
            self._offsets.append(offset)
            formats += f"{offset - end}x{part}"
            end = offset + size
        self._addresses = -(-end // 8) * 8  # of the parameters: where they lie behind them
        self._layout = struct.Struct(f"{formats}{self._addresses - end}x{len(parts)}Q")

    @staticmethod
    def of(compiled) -> DirectKernel | None:
        """None: Triton must launch it."""
        driver = _driver() if triton.__version__.startswith(VERSIONS) else None
        if driver is None or not _is_plain(compiled.metadata):
            return None
        maps = iter(compiled.metadata.tensordesc_meta or ())
        sources: list[tuple[int, _Map | None]] = []  # number of a leaf
        parts: list[str] = []  # formats of the parameters
        for number, type_ in enumerate(_types(tuple(compiled.src.signature.values()))):
            if type_.startswith("tensordesc"):
                details = next(maps, None)
                if details is None or details["fp4_padded"]:
                    return None
                block = tuple(details["block_size"])
                sources.append((number, _Map(block, details["swizzle"])))
                parts += [f"{MAP_BYTES}s", *["i"] * len(block), *["q"] * len(block)]
            elif type_ != "constexpr":
                sources.append((number, None))
                parts.append("Q" if type_.startswith("*") else _FORMATS.get(type_, ""))
        parts += ["Q", "Q"]  # scratch
        if parts[:2] != ["i", "i"] or "" in parts:
            return None
        if _sizes(driver, compiled.function) != [struct.calcsize("=" + part) for part in parts]:
            return None
        return DirectKernel(compiled, sources, parts)

    def bind(self, leaves: list, stream: int) -> Callable[[Grid], DirectLaunch] | None:
        """With these arguments, of which the caller keeps the tensors. None: the thread has no context of CUDA yet."""
        context = c_void_p()
        if _driver().cuCtxGetCurrent(byref(context)) or not context:
            return None
        values: list = [0, 0]
        for number, how in self._sources:
            leaf = leaves[number]
            if how is not None:
                shape, strides, base = tuple(leaf.shape), tuple(leaf.strides), leaf.base
                values += [_encoded(how, base.data_ptr(), shape, strides, base.dtype), *shape, *strides]
            else:
                values.append(leaf.data_ptr() if isinstance(leaf, Tensor) else leaf)
        memory = ctypes.create_string_buffer(self._layout.size + MAP_BYTES)
        first = _aligned(memory)
        addresses = [first + offset for offset in self._offsets]
        self._layout.pack_into(memory, first - addressof(memory), *values, 0, 0, *addresses)
        return lambda grid: DirectLaunch(
            self, _Config(*grid, *self._block, stream, None, 0), memory, first, first + self._addresses
        )


class DirectLaunch:
    """The launches of a kernel with its arguments on a grid. One thread at a time: begin and end are written first."""

    def __init__(self, kernel: DirectKernel, config: _Config, memory: ctypes.Array, first: int, addresses: int):
        self._kept = kernel, config, memory
        self._begin, self._end = c_int32.from_address(first), c_int32.from_address(first + 4)
        self._launch = _driver().cuLaunchKernelEx
        self._arguments = addressof(config), kernel.function, addresses, None

    def __call__(self, begin: int, end: int) -> None:
        self._begin.value, self._end.value = begin, end
        error = self._launch(*self._arguments)
        if error:
            raise RuntimeError(f"a launch failed with CUDA's error {error} (AMOPO_KERNELS_DIRECT_LAUNCH=1)")


def _sizes(driver: ctypes.CDLL, function: int) -> list[int]:
    """Bytes of every parameter of a kernel, as the driver knows them."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while driver.cuFuncGetParamInfo(function, len(sizes), byref(offset), byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def _is_plain(metadata) -> bool:
    """Whether a kernel is launched with nothing but grid, block, shared memory and parameters."""
    runtime = triton.knobs.runtime
    special = (metadata.global_scratch_size, metadata.profile_scratch_size, metadata.launch_cooperative_grid,
               metadata.launch_pdl, metadata.num_ctas > 1, metadata.shared > MOST_SHARED_BYTES)  # fmt: skip
    return not (any(special) or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)

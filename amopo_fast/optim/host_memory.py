"""Pinned host memory, and the copies between it and a device that run beside the device's computation.

One stream per direction; events order the copies and the computation, and the host waits for neither. On a CPU host
and device memory are different buffers of one kind, and the same calls copy at once.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: Triton compiles another kernel for pointers that are not at 16


def aligned(size: int) -> int:
    """`size` bytes, rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """Zeroed blocks of host memory, of whole pages, all taken at once; pinned for CUDA until this object is gone.

    torch's own pinned allocations are rounded up to a power of two, which would waste up to half of them.

    Args:
        sizes: bytes of each block. device: that the blocks are copied to and from.
        what: they hold, for the message. remedy: what to do where they cannot be had.

    Raises:
        RuntimeError: with how much could be had.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, *, what: str, remedy: str):
        self.sizes = list(sizes)
        self.blocks: list[Tensor] = []  # (bytes,) uint8
        for done, size in enumerate(sizes):
            problem = self._take(size, device)
            if problem:
                _unpin(self.blocks, device)
                raise RuntimeError(
                    f"{what} need {sum(sizes) / 2**30:.1f} GiB of pinned host memory, and after "
                    f"{sum(sizes[:done]) / 2**30:.1f} GiB no more could be had ({problem}): free host memory, raise "
                    f"the container's limit, {remedy}"
                )
        if device.type == "cuda":
            # At the end of the process the driver lets go of them.
            weakref.finalize(self, _unpin, self.blocks, device).atexit = False

    def _take(self, size: int, device: torch.device) -> str:
        """Why a further block cannot be had; "" if it is there."""
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            return error.strerror or str(error)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)
        if device.type == "cuda":
            memory.madvise(mmap.MADV_DONTFORK)  # a data loader's worker would copy every pinned page
            code = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
            if int(code):
                return f"cudaHostRegister says {code}"
        self.blocks.append(block)
        return ""


def _unpin(blocks: list[Tensor], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # no copy is under way
        for block in blocks:
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class Transfers:
    """Copies to a device and back to the host. An event is None on a CPU, and before anything was done."""

    def __init__(self, device: torch.device):
        self.device = device
        self._fetching = self._writing = None
        if device.type == "cuda":
            self._fetching, self._writing = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._fetching.wait_stream(torch.cuda.current_stream(device))  # slots are zeroed there

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
        """Copy (destination, source) pairs to the device, behind events. Returns the event of its end."""
        return _copy(self._fetching, pairs, after)

    def write_back(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
        """Copy (destination, source) pairs to the host, behind events. Returns the event of its end."""
        return _copy(self._writing, pairs, after)

    def mark(self) -> Any:
        """An event of all that the current stream has been given."""
        return None if self._fetching is None else torch.cuda.current_stream(self.device).record_event()

    def wait_for(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """Let the host wait until everything is written back, and nothing is read any more."""
        for stream in filter(None, (self._writing, self._fetching)):
            stream.synchronize()


def _copy(stream: Any, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
    if stream is None:
        for destination, source in pairs:
            destination.copy_(source)
        return None
    for event in after:
        if event is not None:
            stream.wait_event(event)
    with torch.cuda.stream(stream):
        for destination, source in pairs:
            destination.copy_(source, non_blocking=True)
    return stream.record_event()

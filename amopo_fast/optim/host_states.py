"""Moments of AdamW in pinned host memory that visit a few slots of GPU memory while the backward pass goes by.

    parcel    what travels at once: the moments of a decoder layer, or of a piece of a parameter outside of the layers
    slot      GPU memory of the largest parcel; SLOTS of them: one in use, one on its way in, one on its way out

    fetch of the next parcel   |   update of this one, on the backward's stream   |   write-back of the last one

One stream per direction; events order them, and the host never waits. In a step each moment is read once and written
once. Which parcel comes next is what came next in the step before (in the first one: from the last block to the first).
A wrong guess, or a layer whose experts get no gradient, costs a transfer and never a result: what is not there is
fetched, and a slot that is needed is written back first. On a CPU the same code copies between host and slots.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amopo_fast.optim.states import layout_of
from amopo_fast.optim.update import PIECE

SLOTS = 3
ALIGNMENT = 256  # bytes: Triton compiles another kernel for pointers that are not at 16


def blocks_of(model: nn.Module) -> list[list[Tensor]]:
    """Trained parameters, each once, in the model's order: those of a layer together, any other one alone.

    A layer is an entry of a ModuleList that lies in no other one.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [f"{name}." for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = next((each for each in outer if name.startswith(each)), None)
            layer = name if prefix is None else prefix + name[len(prefix) :].split(".", 1)[0]
            blocks.setdefault(layer, []).append(parameter)
    return list(blocks.values())


def parcel_bytes(numels: Sequence[int], states: str) -> int:
    """Of the moments of parameters with so many elements, each array at a multiple of ALIGNMENT."""
    sizes = (count * dtype.itemsize for numel in numels for count, dtype in layout_of(numel, states).values())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _piece(numel: int, states: str, room: int) -> int:
    """Elements that travel at once of a parameter outside of the layers: whole PIECEs that fit into `room` bytes."""
    if numel <= PIECE or parcel_bytes([numel], states) <= room:
        return numel
    return max(1, room // parcel_bytes([PIECE], states)) * PIECE


def slot_bytes(blocks: Sequence[Sequence[int]], states: str) -> int:
    """Of one slot, from the elements of every block's parameters; a block of one parameter travels in pieces."""
    room = max((parcel_bytes(block, states) for block in blocks if len(block) > 1), default=0)
    pieces = (_piece(block[0], states, room) for block in blocks if len(block) == 1)
    return max(room, *(parcel_bytes([piece], states) for piece in pieces), 0)


@dataclass(frozen=True)
class _Array:
    """A tensor of a parameter's state, or a piece of it: in the host's buffer, and where it lies in a slot."""

    name: str
    host: Tensor
    offset: int  # bytes

    def on(self, slot: Tensor) -> Tensor:
        return slot[self.offset : self.offset + self.host.nbytes].view(self.host.dtype)


@dataclass(eq=False)
class _Parcel:
    places: dict[Tensor, tuple[int, int, list[_Array]]]  # parameter -> (begin, end, its state)
    copies: list[tuple[Tensor, int]]  # (bytes of the host, where they lie in a slot)
    written: Any = None  # event: the host has what is newest


@dataclass(eq=False)
class _Slot:
    memory: Tensor  # (slot_bytes,) uint8
    ready: Any = None  # event: its parcel is there
    used: Any = None  # event: its last update is made
    free: Any = None  # event: its last parcel has left
    waiting: set[Tensor] = field(default_factory=set)  # parameters of its parcel that are still to be stepped


class HostStates:
    """Zeroed moments of parameters that are all on one device.

    Args:
        blocks: parameters that travel together; the only one of its block may travel in pieces.
        states: "fp32", "8bit" or "4bit".

    Raises:
        ValueError: parameters on several devices.
        RuntimeError: the host's memory cannot be pinned; says how much of it.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], states: str):
        devices = {parameter.device for block in blocks for parameter in block}
        if len(devices) != 1:
            raise ValueError(f"states in host memory need parameters on one device, found {sorted(map(str, devices))}")
        (self.device,) = devices
        sizes = [[parameter.numel() for parameter in block] for block in blocks]
        room = slot_bytes(sizes, states)
        self._states: dict[Tensor, dict[str, Tensor]] = {}
        self._parcels: dict[Tensor, list[_Parcel]] = {}
        buffers = _host_buffers([parcel_bytes(size, states) for size in sizes], self.device)
        order = []
        for block, buffer in reversed(list(zip(blocks, buffers, strict=True))):
            order += self._lay_out(block, buffer, states, room)
        self._next: dict[_Parcel, _Parcel] = dict(zip(order, order[1:], strict=False))
        self._seen: list[_Parcel] = []  # in the order of this step's first updates
        self._resident: dict[_Parcel, _Slot] = {}
        self._vacant = [
            _Slot(torch.zeros(room, dtype=torch.uint8, device=self.device)) for _ in range(min(SLOTS, len(order)))
        ]
        self._fetching = self._writing = None
        if self.device.type == "cuda":
            self._fetching, self._writing = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            self._fetching.wait_stream(torch.cuda.current_stream(self.device))  # the slots are zeroed there
            # Holds the buffers until no copy is under way; at the end of the process the driver lets go of them.
            weakref.finalize(self, _unpin, buffers, self.device).atexit = False

    def _lay_out(self, block: Sequence[Tensor], buffer: Tensor, states: str, room: int) -> list[_Parcel]:
        offset = 0
        places: dict[Tensor, tuple[int, int, list[_Array]]] = {}
        for parameter in block:
            arrays = []
            for name, (count, dtype) in layout_of(parameter.numel(), states).items():
                size = count * dtype.itemsize
                arrays.append(_Array(name, buffer[offset : offset + size].view(dtype), offset))
                offset += -(-size // ALIGNMENT) * ALIGNMENT
            self._states[parameter] = {array.name: array.host for array in arrays}
            places[parameter] = (0, parameter.numel(), arrays)
        parcels = [_Parcel(places, [(buffer, 0)])]
        if len(block) == 1 and (piece := _piece(block[0].numel(), states, room)) < block[0].numel():
            parcels = self._pieces(block[0], piece)
        for parameter in block:
            self._parcels[parameter] = parcels
        return parcels

    def _pieces(self, parameter: Tensor, piece: int) -> list[_Parcel]:
        numel, parcels = parameter.numel(), []
        for begin in range(0, numel, piece):
            end, offset, arrays = min(begin + piece, numel), 0, []
            for name, whole in self._states[parameter].items():
                share = whole[begin * len(whole) // numel : end * len(whole) // numel]
                arrays.append(_Array(name, share, offset))
                offset += -(-share.nbytes // ALIGNMENT) * ALIGNMENT
            copies = [(array.host.view(torch.uint8), array.offset) for array in arrays]
            parcels.append(_Parcel({parameter: (begin, end, arrays)}, copies))
        return parcels

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._states

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors in host memory; what they hold is newest behind `settle`."""
        return self._states[parameter]

    @property
    def nbytes(self) -> int:
        """Of host memory; a step moves as many to the device and back."""
        return sum(tensor.nbytes for state in self._states.values() for tensor in state.values())

    def visit(self, parameter: Tensor) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(begin, end, state of the elements begin..end in a slot), until all of a parameter is there once: the caller
        updates the state in place, on the current stream, before it goes on."""
        for parcel in self._parcels[parameter]:
            slot = self._resident.get(parcel) or self._fetch(parcel)
            if len(slot.waiting) == len(parcel.places):
                self._seen.append(parcel)
            following = self._next.get(parcel)
            if following is not None and following not in self._resident and self._vacant:
                self._fetch(following)
            if slot.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(slot.ready)
            begin, end, arrays = parcel.places[parameter]
            yield begin, end, {array.name: array.on(slot.memory) for array in arrays}
            if self._fetching is not None:
                slot.used = torch.cuda.current_stream(self.device).record_event()
            slot.waiting.discard(parameter)
            if not slot.waiting:
                self._evict(parcel)

    def _fetch(self, parcel: _Parcel) -> _Slot:
        if not self._vacant:
            self._evict(next(iter(self._resident)))
        slot = self._vacant.pop(0)
        pairs = [(slot.memory[offset : offset + host.nbytes], host) for host, offset in parcel.copies]
        slot.ready = self._copy(self._fetching, (slot.free, parcel.written), pairs)
        slot.used, slot.waiting = None, set(parcel.places)
        self._resident[parcel] = slot
        return slot

    def _evict(self, parcel: _Parcel) -> None:
        """Write a parcel back, and its slot is vacant: for what is fetched behind that."""
        slot = self._resident.pop(parcel)
        pairs = [(host, slot.memory[offset : offset + host.nbytes]) for host, offset in parcel.copies]
        slot.free = parcel.written = self._copy(self._writing, (slot.ready, slot.used), pairs)
        self._vacant.append(slot)

    def _copy(self, stream, after, pairs: list[tuple[Tensor, Tensor]]):
        """Copy (destination, source) pairs on a stream, behind events. Returns the event of its end."""
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

    def end_step(self) -> None:
        """Write back what is still in slots; the host does not wait for it."""
        for parcel in list(self._resident):
            self._evict(parcel)
        if self._seen:
            self._next = dict(zip(self._seen, self._seen[1:], strict=False))
        self._seen = []

    def settle(self) -> None:
        """Wait until the host's tensors are the newest: before they are read or replaced."""
        for parcel in list(self._resident):
            self._evict(parcel)
        if self._writing is not None:
            self._writing.synchronize()


def _host_buffers(sizes: list[int], device: torch.device) -> list[Tensor]:
    """Zeroed bytes of whole pages, pinned for CUDA.

    torch's own pinned allocations are rounded up to a power of two, which would waste up to half of them.
    """
    buffers = []
    for done, size in enumerate(sizes):
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _no_memory(sizes, done, f"{error.strerror or error}") from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        if device.type == "cuda":
            memory.madvise(mmap.MADV_DONTFORK)  # a data loader's worker would copy every pinned page
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        if device.type == "cuda":
            code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
            if int(code):
                _unpin(buffers, device)
                raise _no_memory(sizes, done, f"cudaHostRegister says {code}")
        buffers.append(buffer)
    return buffers


def _no_memory(sizes: list[int], done: int, why: str) -> RuntimeError:
    return RuntimeError(
        f"the optimizer's states need {sum(sizes) / 2**30:.1f} GiB of pinned host memory, and after "
        f"{sum(sizes[:done]) / 2**30:.1f} GiB no more could be had ({why}): free host memory, raise the container's "
        "limit, use --optim_in_backward adamw_4bit, or leave --optimizer_states host out"
    )


def _unpin(buffers: list[Tensor], device: torch.device) -> None:
    torch.cuda.synchronize(device)
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

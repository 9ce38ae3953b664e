"""Moments of AdamW in pinned host memory that visit a few slots of GPU memory while the backward pass goes by.

    parcel    what travels at once: the moments of a decoder layer, or of a piece of a parameter outside of the layers
    slot      GPU memory of the largest parcel; SLOTS of them: one in use, one on its way in, one on its way out

    fetch of the next parcel   |   update of this one, on the backward's stream   |   write-back of the last one

In a step each moment is read once and written once, and the host never waits. Which parcel comes next is what came next
in the step before (in the first one: from the last block to the first). A wrong guess, or a layer whose experts get no
gradient, costs a transfer and never a result: what is not there is fetched, and a slot that is needed is written back
first. On a CPU the same code copies between host and slots (host_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amopo_fast.optim.host_memory import HostMemory, Transfers, aligned
from amopo_fast.optim.states import layout_of
from amopo_fast.optim.update import PIECE

SLOTS = 3


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
    """Of the moments of parameters with so many elements, each array aligned."""
    sizes = (count * dtype.itemsize for numel in numels for count, dtype in layout_of(numel, states).values())
    return sum(map(aligned, sizes))


def piece_of(numel: int, states: str, room: int) -> int:
    """Elements that travel at once of a parameter outside of the layers: whole PIECEs that fit into `room` bytes."""
    if numel <= PIECE or parcel_bytes([numel], states) <= room:
        return numel
    return max(1, room // parcel_bytes([PIECE], states)) * PIECE


def slot_bytes(blocks: Sequence[Sequence[int]], states: str) -> int:
    """Of one slot, from the elements of every block's parameters; a block of one parameter travels in pieces."""
    room = max((parcel_bytes(block, states) for block in blocks if len(block) > 1), default=0)
    pieces = (piece_of(block[0], states, room) for block in blocks if len(block) == 1)
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
    """Zeroed moments of parameters that are all updated on one device.

    Args:
        blocks: parameters that travel together; the only one of its block may travel in pieces.
        states: "fp32", "8bit" or "4bit".
        device: where the parameters are updated; default: where they are.

    Raises:
        ValueError: parameters on several devices.
        RuntimeError: the host's memory cannot be pinned; says how much of it.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], states: str, device: torch.device | None = None):
        devices = {device or parameter.device for block in blocks for parameter in block}
        if len(devices) != 1:
            raise ValueError(f"states in host memory need parameters on one device, found {sorted(map(str, devices))}")
        (device,) = devices
        sizes = [[parameter.numel() for parameter in block] for block in blocks]
        room = slot_bytes(sizes, states)
        self._states: dict[Tensor, dict[str, Tensor]] = {}
        self._parcels: dict[Tensor, list[_Parcel]] = {}
        self._memory = HostMemory(
            [parcel_bytes(size, states) for size in sizes], device, what="the optimizer's states",
            remedy="use --optim_in_backward adamw_4bit, or leave --optimizer_states host out",
        )  # fmt: skip
        order = []
        for block, buffer in reversed(list(zip(blocks, self._memory.blocks, strict=True))):
            order += self._lay_out(block, buffer, states, room)
        self._next: dict[_Parcel, _Parcel] = dict(zip(order, order[1:], strict=False))
        self._seen: list[_Parcel] = []  # in the order of this step's first updates
        self._resident: dict[_Parcel, _Slot] = {}
        self._vacant = [_Slot(torch.zeros(room, dtype=torch.uint8, device=device)) for _ in order[:SLOTS]]
        self._transfers = Transfers(device)

    def _lay_out(self, block: Sequence[Tensor], buffer: Tensor, states: str, room: int) -> list[_Parcel]:
        offset = 0
        places: dict[Tensor, tuple[int, int, list[_Array]]] = {}
        for parameter in block:
            arrays = []
            for name, (count, dtype) in layout_of(parameter.numel(), states).items():
                size = count * dtype.itemsize
                arrays.append(_Array(name, buffer[offset : offset + size].view(dtype), offset))
                offset += aligned(size)
            self._states[parameter] = {array.name: array.host for array in arrays}
            places[parameter] = (0, parameter.numel(), arrays)
        parcels = [_Parcel(places, [(buffer, 0)])]
        if len(block) == 1 and (piece := piece_of(block[0].numel(), states, room)) < block[0].numel():
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
                offset += aligned(share.nbytes)
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
            self._transfers.wait_for(slot.ready)
            begin, end, arrays = parcel.places[parameter]
            yield begin, end, {array.name: array.on(slot.memory) for array in arrays}
            slot.used = self._transfers.mark()
            slot.waiting.discard(parameter)
            if not slot.waiting:
                self._evict(parcel)

    def _fetch(self, parcel: _Parcel) -> _Slot:
        if not self._vacant:
            self._evict(next(iter(self._resident)))
        slot = self._vacant.pop(0)
        pairs = [(slot.memory[offset : offset + host.nbytes], host) for host, offset in parcel.copies]
        slot.ready = self._transfers.fetch(pairs, (slot.free, parcel.written))
        slot.used, slot.waiting = None, set(parcel.places)
        self._resident[parcel] = slot
        return slot

    def _evict(self, parcel: _Parcel) -> None:
        """Write a parcel back, and its slot is vacant: for what is fetched behind that."""
        slot = self._resident.pop(parcel)
        pairs = [(host, slot.memory[offset : offset + host.nbytes]) for host, offset in parcel.copies]
        slot.free = parcel.written = self._transfers.write_back(pairs, (slot.ready, slot.used))
        self._vacant.append(slot)

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
        self._transfers.settle()

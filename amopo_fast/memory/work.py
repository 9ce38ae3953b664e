"""What a training step computes and copies, layer by layer: FLOP, updated parameters and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amopo_fast.memory.parameters import Parameter
from amopo_fast.optim.host_states import SLOTS, parcel_bytes, piece_of, slot_bytes


@dataclass(frozen=True)
class Parcel:
    """What travels at once of the optimizer's states: of a layer, or a piece of a parameter outside of the layers."""

    name: tuple[str, int]
    numel: float
    nbytes: float


@dataclass(frozen=True)
class Work:
    """A micro-batch and its update. All layers are taken to be alike; what travels is in bytes."""

    layers: int
    forward: float  # FLOP of one layer
    recomputation: float
    gradients: float  # FLOP of one layer
    head_forward: float  # FLOP
    head_backward: float
    states: str  # of the optimizer: fp32, bf16, 8bit or 4bit
    layer_numel: float  # updated parameters of one layer
    head: tuple[Parcel, ...]  # in the order of their updates, all of them before the layers' and behind
    embedding: tuple[Parcel, ...]
    weight_bytes: float  # of one layer that streams
    layer_states: float  # of one layer
    checkpoint_bytes: float = 0  # of a layer's input, where it waits in host memory
    state_slots: int = 0  # 0: states on the GPU
    weight_slots: int = 0  # 0: weights on the GPU

    @property
    def flops(self) -> float:
        layer = self.forward + self.recomputation + self.gradients
        return self.layers * layer + self.head_forward + self.head_backward

    @property
    def updated(self) -> float:
        """Parameters."""
        return self.layers * self.layer_numel + sum(parcel.numel for parcel in (*self.head, *self.embedding))

    @property
    def to_device(self) -> float:
        """Bytes of a step: layers go there in each pass, but for those in the slots where the passes turn."""
        return 2 * self._fetched * self.weight_bytes + self._once

    @property
    def to_host(self) -> float:
        """Bytes of a step: a layer is written back when it leaves its slot with an update."""
        return min(self.layers, 2 * self._fetched) * self.weight_bytes + self._once

    @property
    def _fetched(self) -> int:
        """Layers that a pass fetches."""
        return max(0, self.layers - self.weight_slots) if self.weight_slots else 0

    @property
    def _once(self) -> float:
        """What moves once each way."""
        states = self.layers * self.layer_states + sum(parcel.nbytes for parcel in (*self.head, *self.embedding))
        return self.layers * self.checkpoint_bytes + (states if self.state_slots else 0)


def work_of(
    parameters: Sequence[Parameter], layers: int, states: str, *, flops: float, forward_flops: float, product: float,
    head_trained: bool, recomputed: float, streamed: Sequence[int] = (), weight_slots: int = 0,
    host_states: bool = False, checkpoint_bytes: float = 0, gpus: int = 1,
) -> Work:  # fmt: skip
    """The work of a step.

    Args:
        flops: of all of it. forward_flops: of its forward pass. product: of the head's matrix product.
        recomputed: share of the layers. streamed: bytes of each layer in host memory. gpus: that share the updates.
    """
    blocks: dict[int, list[int]] = {}
    for p in parameters:
        if p.block is not None:
            blocks.setdefault(p.block, []).append(p.numel)
    of_layers = [block for block in blocks.values() if len(block) > 1]
    first = next((number for number, block in blocks.items() if len(block) > 1), -1)
    room = slot_bytes(list(blocks.values()), states) if host_states else 0
    head, embedding = [], []
    for number, block in sorted(blocks.items(), reverse=True):
        if len(block) == 1:
            (embedding if number < first else head).extend(_pieces(number, block[0], states, room, gpus))
    forward = (forward_flops - product) / layers
    again, head_backward = recomputed * forward, (3 if head_trained else 1) * product
    return Work(
        layers=layers, forward=forward, recomputation=again, head_forward=product, head_backward=head_backward,
        gradients=(flops - product - head_backward) / layers - forward - again, states=states,
        layer_numel=sum(map(sum, of_layers)) / layers / gpus, head=tuple(head), embedding=tuple(embedding),
        weight_bytes=sum(streamed) / layers, checkpoint_bytes=checkpoint_bytes,
        layer_states=sum(parcel_bytes(block, states) for block in of_layers) / layers if host_states else 0,
        state_slots=SLOTS if host_states else 0, weight_slots=weight_slots if streamed else 0,
    )  # fmt: skip


def _pieces(number: int, numel: int, states: str, room: int, gpus: int) -> list[Parcel]:
    """Of a parameter outside of the layers; where its states stay, it is one."""
    if not room:
        return [Parcel((f"parameter {number}", 0), numel // gpus, 0)]
    most = piece_of(numel, states, room)
    sizes = [min(most, numel - begin) for begin in range(0, numel, most)]
    name = f"parameter {number}"
    return [Parcel((name, place), size, parcel_bytes([size], states)) for place, size in enumerate(sizes)]

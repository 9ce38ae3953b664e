"""What the streams of a training step do when: a simulation of weights and states in host memory.

Copies and computation are issued in the order of the host's program, with the slots and events of optim/host_states.py
and models/streaming.py, to streams that keep this order. An operation begins when its stream, the events that it waits
for and its link are free; a link carries one copy at a time, and both links go at once. The host is never late, but it
waits for the loss before the backward pass and for the step at its end, as survival/guard.py does.

A layer's states have to be there when its gradients begin, where the program needs them at the first gradient: a few
milliseconds of caution in each layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from amopo_fast.memory.work import Parcel, Work
from amopo_fast.models.streaming import arrivals

TO_GPU, TO_HOST, COMPUTE = "to the GPU", "to the host", "GPU"
STEADY = 3  # steps that are simulated; the last one is told: it begins as the one before it ended


@dataclass(eq=False)
class Operation:
    stream: str
    kind: str
    label: Hashable
    seconds: float
    after: tuple[Operation, ...]
    link: str | None = None
    nbytes: float = 0
    slot: int | None = None
    begin: float = 0.0
    end: float = 0.0


@dataclass
class Program:
    """Operations in the order in which the host issues them."""

    rate: float  # FLOP/s
    update: float  # seconds per parameter
    to_gpu: float  # bytes/s
    to_host: float
    operations: list[Operation] = field(default_factory=list)
    last: Operation | None = None  # of the computation
    _waited_for: Operation | None = None

    def compute(
        self, kind: str, label: Hashable, flops: float, ready: Operation | None = None, updated: float = 0
    ) -> None:
        """updated: parameters."""
        seconds = flops / self.rate + updated * self.update
        self.last = self._issue(Operation(COMPUTE, kind, label, seconds, self._events((ready,))))

    def copy(self, kind: str, label: Hashable, nbytes: float, link: str, slot: int, after: Iterable[Operation | None]):
        seconds = nbytes / (self.to_gpu if link == TO_GPU else self.to_host)
        return self._issue(Operation(f"{kind} {link}", kind, label, seconds, self._events(after), link, nbytes, slot))

    def copy_checkpoint(self, label: Hashable, nbytes: float, link: str) -> None:
        """On the computation's own stream, as torch.autograd.graph.save_on_cpu does."""
        seconds = nbytes / (self.to_gpu if link == TO_GPU else self.to_host)
        self.last = self._issue(Operation(COMPUTE, "checkpoint", label, seconds, self._events(()), link, nbytes))

    def wait(self) -> None:
        """The host goes on when the computation issued so far has ended."""
        self._waited_for = self.last

    def _events(self, after: Iterable[Operation | None]) -> tuple[Operation, ...]:
        return tuple(each for each in (*after, self._waited_for) if each is not None)

    def _issue(self, operation: Operation) -> Operation:
        self.operations.append(operation)
        return operation

    def run(self) -> list[Operation]:
        """Give every operation its begin and end: the one that can begin first does, of several the first issued."""
        queues: dict[str, list[Operation]] = {}
        for operation in self.operations:
            queues.setdefault(operation.stream, []).append(operation)
        places, ended = dict.fromkeys(queues, 0), set()
        free: dict[str | None, float] = {}
        number = {operation: place for place, operation in enumerate(self.operations)}
        for _ in self.operations:
            ready = []
            for name, queue in queues.items():
                if places[name] == len(queue) or not ended.issuperset((head := queue[places[name]]).after):
                    continue
                link = free.get(head.link, 0.0) if head.link else 0.0
                ready.append((max([free.get(name, 0.0), link, *(each.end for each in head.after)]), number[head], head))
            begin, _, operation = min(ready)
            operation.begin, operation.end = begin, begin + operation.seconds
            free[operation.stream] = operation.end
            if operation.link:
                free[operation.link] = operation.end
            places[operation.stream] += 1
            ended.add(operation)
        return self.operations


@dataclass(eq=False)
class _Slot:
    number: int
    ready: Operation | None = None
    used: Operation | None = None
    free: Operation | None = None


class _Weights:
    """Layers in slots; see models/streaming.py."""

    def __init__(self, program: Program, nbytes: float, layers: int, slots: int):
        self._program, self._nbytes, self._layers = program, nbytes, layers
        self._resident: dict[int, _Slot] = {}
        self._slots = min(slots, layers)
        self._vacant = [_Slot(number) for number in range(self._slots)]
        self._changed: set[int] = set()
        self._written: dict[int, Operation] = {}

    def enter(self, layer: int, direction: int) -> Operation | None:
        """The event behind which a layer is there; those that follow are on their way."""
        for leaving, coming in arrivals(layer, direction, self._layers, self._resident, self._slots):
            if leaving is not None:
                self._evict(leaving)
            self._fetch(coming)
        if direction < 0:
            self._changed.add(layer)
        return self._resident[layer].ready

    def _fetch(self, layer: int) -> None:
        slot = self._vacant.pop(0)
        after = (slot.free, self._written.get(layer))
        slot.ready = self._program.copy("weights", layer, self._nbytes, TO_GPU, slot.number, after)
        self._resident[layer] = slot

    def _evict(self, layer: int) -> None:
        slot = self._resident.pop(layer)
        slot.free = self._program.last
        if layer in self._changed:
            after = (slot.ready, slot.free)
            slot.free = self._program.copy("weights", layer, self._nbytes, TO_HOST, slot.number, after)
            self._written[layer] = slot.free
            self._changed.discard(layer)
        self._vacant.append(slot)


class _States:
    """Parcels of the optimizer's states in slots; see optim/host_states.py."""

    def __init__(self, program: Program, order: Sequence[Parcel], slots: int):
        self._program = program
        self._next = dict(zip(order, order[1:], strict=False))
        self._resident: dict[Parcel, _Slot] = {}
        self._vacant = [_Slot(number) for number in range(min(slots, len(order)))]
        self._written: dict[Parcel, Operation] = {}

    def visit(self, parcel: Parcel) -> Operation | None:
        """The event behind which a parcel can be updated; the one that follows is on its way if there is room."""
        if parcel not in self._resident:
            self._fetch(parcel)
        following = self._next.get(parcel)
        if following is not None and following not in self._resident and self._vacant:
            self._fetch(following)
        return self._resident[parcel].ready

    def updated(self, parcel: Parcel) -> None:
        slot = self._resident.pop(parcel)
        after = (slot.ready, self._program.last)
        slot.free = self._written[parcel] = self._program.copy(
            "states", parcel.name, parcel.nbytes, TO_HOST, slot.number, after
        )
        self._vacant.append(slot)

    def _fetch(self, parcel: Parcel) -> None:
        slot = self._vacant.pop(0)
        after = (slot.free, self._written.get(parcel))
        slot.ready = self._program.copy("states", parcel.name, parcel.nbytes, TO_GPU, slot.number, after)
        self._resident[parcel] = slot


@dataclass(frozen=True)
class Timeline:
    """STEADY steps, told in seconds from where the last one begins: where the computation of the one before it ends."""

    operations: Sequence[Operation]
    first: int  # of the last step's operations
    seconds: float  # of the last step

    def moved(self, link: str) -> float:
        """Bytes of a step over a link."""
        return sum(each.nbytes for each in self.operations[self.first :] if each.link == link)


def simulate(work: Work, rate: float, update: float, to_gpu: float, to_host: float) -> Timeline:
    """A step in its steady state.

    Args:
        rate: FLOP/s. update: seconds per parameter. to_gpu, to_host: bytes/s.
    """
    program = Program(rate, update, to_gpu, to_host)
    weights = _Weights(program, work.weight_bytes, work.layers, work.weight_slots) if work.weight_slots else None
    layers = [Parcel(("layer", layer), work.layer_numel, work.layer_states) for layer in range(work.layers)]
    states = None
    if work.state_slots:
        states = _States(program, [*work.head, *reversed(layers), *work.embedding], work.state_slots)
    begin = None
    for _ in range(STEADY):
        first, begin = len(program.operations), program.last
        _step(program, work, weights, states, layers)
    program.run()
    origin, seconds = begin.end, program.last.end - begin.end
    for operation in program.operations:
        operation.begin, operation.end = operation.begin - origin, operation.end - origin
    return Timeline(program.operations, first, seconds)


def _step(program: Program, work: Work, weights, states, layers: Sequence[Parcel]) -> None:
    numbers = range(work.layers)
    for layer in numbers:
        ready = weights.enter(layer, 1) if weights else None
        if work.checkpoint_bytes:
            program.copy_checkpoint(layer, work.checkpoint_bytes, TO_HOST)
        program.compute("forward", layer, work.forward, ready)
    program.compute("head", 0, work.head_forward)
    program.wait()  # is the loss finite?
    program.compute("head", 1, work.head_backward)
    _update(program, work, states, work.head)
    for layer in reversed(numbers):
        ready = weights.enter(layer, -1) if weights else None
        if work.checkpoint_bytes:
            program.copy_checkpoint(layer, work.checkpoint_bytes, TO_GPU)
        program.compute("recomputation", layer, work.recomputation, ready)
        ready = states.visit(layers[layer]) if states else None
        program.compute("gradients and update", layer, work.gradients, ready, work.layer_numel)
        if states:
            states.updated(layers[layer])
    _update(program, work, states, work.embedding)
    program.wait()  # are the weights?


def _update(program: Program, work: Work, states, parcels: Sequence[Parcel]) -> None:
    for parcel in parcels:
        ready = states.visit(parcel) if states else None
        program.compute("gradients and update", parcel.name, 0, ready, parcel.numel)
        if states:
            states.updated(parcel)

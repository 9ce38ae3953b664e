"""What CUDA's streams may reorder, found on a CPU: accesses to the same memory that no event puts in order.

    races = Races(monkeypatch)          # from here on Transfers has streams, and everything runs at once as ever
    races.watch(slots, blocks)          # by name flat tensors of device memory, zeroed, and of the host's
    with races:
        ...                             # raises Race

An access happens behind those that its stream was given before, behind the events that the stream waited for, and
behind what the host knew when it issued it; the host knows of a stream what it has synchronised with. Operations on
device memory run on the current stream, those on host memory on the host, but for copies. That torch blocks by itself
(`item()`) tells the host nothing here, so that no order rests on it. Of two overlapping accesses, one of them a write,
the later one has to be behind the earlier: else a GPU may run them in another order.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amopo_fast.optim import host_memory
from amopo_fast.optim.host_memory import Transfers

CUDA = SimpleNamespace(type="cuda")


class _Torch:
    """torch, with streams."""

    def __getattr__(self, name: str):
        return getattr(torch, name)


class Actor:
    """A stream, or the host: how much of every actor's work is behind it."""

    def __init__(self, races: Races, name: str):
        self.races, self.name, self.clock = races, name, {name: 0}

    def learn(self, clock: dict[str, int]) -> None:
        for name, count in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def act(self) -> tuple[str, int]:
        self.learn(self.races.host.clock)
        self.clock[self.name] += 1
        return self.name, self.clock[self.name]

    # What host_memory.py asks of torch's streams.

    def record_event(self) -> dict[str, int]:
        self.learn(self.races.host.clock)
        return dict(self.clock)

    def wait_event(self, event: dict[str, int]) -> None:
        self.learn(event)

    def wait_stream(self, other: Actor) -> None:
        self.learn(other.record_event())

    def synchronize(self) -> None:
        self.races.host.learn(self.record_event())


class Race(AssertionError):
    """Two accesses without an order, in words."""


class Races(TorchDispatchMode):
    def __init__(self, monkeypatch):
        super().__init__()
        self.host, self.compute = Actor(self, "host"), Actor(self, "computation")
        self.current, self.accesses = self.compute, 0
        self._memory: list[tuple[int, int, str, bool]] = []  # begin, end, name, whether on the device; in order
        # (begin, end, actor, whether it wrote) -> the last time
        self._last: dict[tuple[int, int, str, bool], int] = {}
        self._zeroed = self.compute.act()[1]
        init, numbers = Transfers.__init__, itertools.count(1)
        monkeypatch.setattr(Transfers, "__init__", lambda transfers, device: init(transfers, CUDA))
        fake = _Torch()
        fake.cuda = SimpleNamespace(
            Stream=lambda device: Actor(self, f"stream {next(numbers)}"), stream=self._stream,
            current_stream=lambda device=None: self.current,
        )  # fmt: skip
        monkeypatch.setattr(host_memory, "torch", fake)

    @contextlib.contextmanager
    def _stream(self, stream: Actor):
        before, self.current = self.current, stream
        yield
        self.current = before

    def watch(self, slots: dict[str, torch.Tensor], blocks: dict[str, torch.Tensor]) -> None:
        for on_device, parts in ((True, slots), (False, blocks)):
            for name, memory in parts.items():
                begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
                self._memory.append((begin, end, name, on_device))
                if on_device:
                    self._last[begin, end, self.compute.name, True] = self._zeroed
        self._memory.sort()
        self._begins = [begin for begin, *_ in self._memory]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in returns):  # no view
            given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
            for argument in func._schema.arguments:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        self._access(func, tensor, writes)
        return result

    def _access(self, func, tensor: torch.Tensor, writes: bool) -> None:
        begin = tensor.data_ptr()
        place = bisect.bisect_right(self._begins, begin) - 1
        if place < 0 or begin >= self._memory[place][1]:
            return
        *_, name, on_device = self._memory[place]
        actor = self.current if on_device or self.current is not self.compute else self.host
        who, now = actor.act()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = begin + (reach + 1) * tensor.element_size()
        self.accesses += 1
        for (other_begin, other_end, other, wrote), when in self._last.items():
            if other_begin < end and begin < other_end and (writes or wrote) and actor.clock.get(other, 0) < when:
                raise Race(f"{name}: {func} of {who} {'writes' if writes else 'reads'} what {other} "
                           f"{'wrote' if wrote else 'reads'}")  # fmt: skip
        self._last[begin, end, who, writes] = now

"""Gluon's source of the warp-specialised kernel, run on a CPU: Triton has no interpreter for Gluon.

    with running(monkeypatch, seed): ...      the kernel's launches run here, in a random order of its parts

What the kernel asks of Hopper is replaced: shared memory, barriers with phases and byte counts, the TMA, asynchronous
products and the split into warps. Everything else is the source itself, the epilogues in Triton's interpreter. The
parts of a program take turns at every one of these operations, by chance; a copy lands at any time after it was asked
for, and a product reads its operands as late as the program lets it. Raises ProtocolError where all parts wait, where a
stage is overwritten that a product still reads, and where a barrier gets more arrivals or bytes than it counts.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from amopo_kernels.head import launch, score_loop, warp_specialized


class ProtocolError(Exception):
    pass


class Barrier:
    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def index(self, i):  # of an array of one
        return self

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, more_bytes: int) -> None:
        self.pending -= arrivals
        self.bytes += more_bytes
        if self.pending < 0:
            raise ProtocolError("a barrier gets more arrivals than it counts")
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def is_over(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Barriers:
    def __init__(self, size: int):
        self.all = [Barrier() for _ in range(size)]

    def index(self, i) -> Barrier:
        return self.all[int(i)]


class Buffer:
    """A stage's matrix."""

    def __init__(self, shape):
        self.values = np.full(shape, np.nan, np.float32)
        self.readers = 0  # products in flight


class Buffers:
    def __init__(self, shape):
        self.all = [Buffer(shape[1:]) for _ in range(int(shape[0]))]

    def index(self, i) -> SimpleNamespace:
        buffer = self.all[int(i)]
        return SimpleNamespace(buffer=buffer, permute=lambda order: buffer)


class Accumulator:
    """Sums, and the products that are not in them yet."""

    def __init__(self, values: np.ndarray, waiting: list[tuple[Buffer, Buffer, bool]]):
        self.values, self.waiting = values, waiting

    def finish(self, all_but: int) -> None:
        while len(self.waiting) > all_but:
            x, w, adds = self.waiting.pop(0)
            self.values = x.values @ w.values.T + (self.values if adds else 0)
            x.readers, w.readers = x.readers - 1, w.readers - 1


class Program:
    """Parts of one program of the grid, each in a thread, of which one runs at a time."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.copies: list[Callable[[], None]] = []  # that the TMA was asked for
        self.turns: dict[threading.Thread, threading.Semaphore] = {}
        self.blocked: dict[threading.Thread, Callable[[], bool]] = {}
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Of the part that calls it."""
        thread = threading.current_thread()
        self.blocked[thread] = until
        self.back.release()
        self.turns[thread].acquire()
        if self.error:
            raise SystemExit

    def run(self, parts: list[Callable[[], None]]) -> None:
        def body(part: Callable[[], None]) -> None:
            try:
                self.pause()
                part()
            except SystemExit:
                pass
            except BaseException as error:
                self.error = self.error or error
            del self.blocked[threading.current_thread()]
            self.back.release()

        for part in parts:
            thread = threading.Thread(target=body, args=(part,), daemon=True)
            self.turns[thread] = threading.Semaphore(0)
            thread.start()
            self.back.acquire()
        while self.blocked and not self.error:
            able = [thread for thread, until in self.blocked.items() if until()]
            choices = able + list(range(len(self.copies)))
            if not choices:
                self.error = ProtocolError("all parts wait for each other")
                break
            choice = self.chance.choice(choices)
            if isinstance(choice, int):
                try:
                    self.copies.pop(choice)()
                except ProtocolError as error:
                    self.error = error
            else:
                self.turns[choice].release()
                self.back.acquire()
        for thread in list(self.blocked):
            self.turns[thread].release()
            self.back.acquire()
        if self.error:
            raise self.error
        if self.copies:
            raise ProtocolError("a program ends before its copies land")

    # ----- what the source calls -----

    def load(self, matrix, place, barrier: Barrier, into: SimpleNamespace) -> None:
        buffer, (row, column) = into.buffer, map(int, place)

        def copy() -> None:
            if buffer.readers:
                raise ProtocolError("a stage is overwritten that a product reads")
            rows, columns = buffer.values.shape
            found = matrix.base[row : row + rows, column : column + columns].float().numpy()
            buffer.values[:] = 0
            buffer.values[: found.shape[0], : found.shape[1]] = found
            barrier.change(0, -buffer.values.size * matrix.base.itemsize)

        self.copies.append(copy)
        self.pause()

    def wait(self, barrier: Barrier, parity) -> None:
        self.pause(lambda: barrier.is_over(int(parity)))

    def arrive(self, barrier: Barrier, pred=True) -> None:
        if pred:
            barrier.change(1, 0)
        self.pause()

    def expect(self, barrier: Barrier, size) -> None:
        barrier.change(1, int(size))
        self.pause()

    def multiply(self, x, w: Buffer, accumulator, use_acc, is_async) -> Accumulator:
        assert is_async
        if not isinstance(accumulator, Accumulator):
            accumulator = Accumulator(accumulator.handle.data, [])
        x.buffer.readers, w.readers = x.buffer.readers + 1, w.readers + 1
        accumulator.waiting.append((x.buffer, w, bool(use_acc)))
        self.pause()
        return accumulator

    def finish(self, all_but: int, deps):
        (accumulator,) = deps
        accumulator.finish(all_but)
        if all_but:
            return accumulator
        values = accumulator.values
        return tl.tensor(TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape)))


def language(program: Program) -> dict:
    """The names of warp_specialized's module that stand for Hopper."""

    def allocate(dtype, shape, layout):
        if layout != "barriers":
            return Buffers(shape)
        return Barrier() if shape == [1] else Barriers(shape[0])

    def split(parts, warps, registers) -> None:
        program.run([lambda function=function, values=values: function(*values) for function, values in parts])

    source = warp_specialized
    finish_strip = source._finish_strip.fn
    return {
        "gl": SimpleNamespace(
            cdiv=lambda a, b: -(-int(a) // int(b)), minimum=lambda a, b: min(int(a), int(b)), int64=None,
            program_id=lambda axis: int(tl.program_id(axis)), num_programs=lambda axis: int(tl.num_programs(axis)),
            float32=tl.float32, zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype), static_range=range,
            arange=lambda begin, end, layout: tl.arange(begin, end), convert_layout=lambda values, layout: values,
            SliceLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None, allocate_shared_memory=allocate,
            warp_specialize=split,
        ),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count), wait=program.wait,
            arrive=program.arrive, expect=program.expect,
        ),
        "hopper": SimpleNamespace(warpgroup_mma=program.multiply, warpgroup_mma_wait=program.finish),
        "load": program.load, "CONSUMERS": 2, "_wide_stores": lambda strip: None,
        "_produce": source._produce.fn, "_consume": source._consume.fn, "_finish_strip": finish_strip,
    }  # fmt: skip


def descriptor(matrix) -> SimpleNamespace:
    rows, columns = matrix.block_shape
    size = SimpleNamespace(nbytes=rows * columns * matrix.base.itemsize)
    return SimpleNamespace(base=matrix.base, block_type=size, dtype=None, layout=None)


class Kernel:
    """In the place of warp_specialized_kernel."""

    def __init__(self, monkeypatch, seed: int):
        self._monkeypatch, self._chance = monkeypatch, random.Random(seed)
        self._kernel = warp_specialized.warp_specialized_kernel.fn
        self.launches = 0

    def __getitem__(self, grid):
        def launched(begin, end, hidden, weight, scoring, epilogue, features, num_warps, **constants):
            global _run
            sources = descriptor(hidden), descriptor(weight)

            def _run(begin, end, scoring, epilogue) -> None:
                with self._monkeypatch.context() as patch:
                    for name, value in language(Program(self._chance)).items():
                        patch.setattr(warp_specialized, name, value)
                    self._kernel(begin, end, *sources, scoring, epilogue, features, **constants)

            self.launches += 1
            _in_the_interpreter[grid](begin, end, scoring, epilogue)

        return launched


@triton.jit
def _in_the_interpreter(begin, end, scoring, epilogue):
    _run(begin, end, scoring, epilogue)  # noqa: F821


def use(monkeypatch, seed: int, ring: warp_specialized.Ring) -> Kernel:
    """From here on the head's scores are this kernel's, with tiles of Triton's interpreter, where the epilogue fits."""
    tile = launch.INTERPRETER.scores
    kernel = Kernel(monkeypatch, seed)
    for owner, name, value in (
        (score_loop, "WARP_SPECIALIZED", True), (warp_specialized, "RING", ring),
        (warp_specialized, "ROWS", tile.rows // 2), (warp_specialized, "warp_specialized_kernel", kernel),
        (tl.block_type, "layout", None),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value, raising=owner is not tl.block_type)
    monkeypatch.setitem(launch.SIXTEEN_BIT, 90, launch.INTERPRETER)
    return kernel

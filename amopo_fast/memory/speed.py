"""How long a micro-batch takes, and whether copies from and to the host hide behind the computation."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from amopo_fast.memory.estimate import Estimate, Row
from amopo_fast.memory.gpus import Gpu
from amopo_fast.memory.timeline import simulate
from amopo_fast.memory.work import Work

# Of an H100, measured once: FLOP/s of whole steps of 14B, less their updates, over the dense bfloat16 peak, and seconds
# per parameter of an update by its states (benchmarks/results: memory_14B and optimizer_update). Other cards are taken
# to reach the same.
EFFICIENCY = 0.55
SOURCE = "assumed, as 14B reached it on an H100"
UPDATE = {"fp32": 7.5e-12, "bf16": 6.5e-12, "8bit": 15.4e-12, "4bit": 10.6e-12}


@dataclass(frozen=True)
class Time:
    """Seconds of one micro-batch with the optimizer's step."""

    compute: float  # `update` is of it
    update: float
    to_device: float  # of the copies alone, of each direction
    to_host: float
    exposed: float  # of the copies, what the computation waits for

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def hides(self) -> bool:
        """Whether the copies cost less than 5 % of the speed that the run would have without them."""
        return self.exposed <= 0.05 * self.total


def work_on(prediction: Estimate, gpu: Gpu) -> Work:
    """What a run does on a card: with weights in host memory, as many layers are there at once as training takes."""
    if not prediction.streamed:
        return prediction.work
    return dataclasses.replace(prediction.work, weight_slots=prediction.slots_on(gpu.memory))


def copied(prediction: Estimate, gpu: Gpu) -> tuple[float, float]:
    """Bytes of a micro-batch (to the GPU, back)."""
    work = work_on(prediction, gpu)
    return work.to_device, work.to_host


def time_of(prediction: Estimate, gpu: Gpu, efficiency: float = EFFICIENCY) -> Time | None:
    """Of a micro-batch, its copies simulated layer by layer (timeline.py); None if the GPU's peak is not known."""
    if not gpu.flops:
        return None
    work, rate = work_on(prediction, gpu), gpu.flops * efficiency
    update = work.updated * UPDATE[work.states]
    compute = work.flops / rate + update
    if not work.to_device:
        return Time(compute, update, 0.0, 0.0, 0.0)
    seconds = _seconds(work, rate, gpu.to_device, gpu.to_host)
    to_device, to_host = work.to_device / gpu.to_device, work.to_host / gpu.to_host
    return Time(compute, update, to_device, to_host, max(0.0, seconds - compute))


@functools.lru_cache(maxsize=256)
def _seconds(work: Work, rate: float, to_device: float, to_host: float) -> float:
    return simulate(work, rate, UPDATE[work.states], to_device, to_host).seconds


def tokens_per_second(prediction: Estimate, row: Row, gpu: Gpu, gpus: int = 1, efficiency: float = EFFICIENCY) -> float:
    """Computed tokens/s over all GPUs, each with a micro-batch of its own; 0.0 if the GPU's peak is not known."""
    time = time_of(prediction, gpu, efficiency)
    return gpus * row.tokens / time.total if time else 0.0

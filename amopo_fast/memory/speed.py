"""How long a micro-batch takes, and whether copies from and to the host hide behind the computation."""

from __future__ import annotations

from dataclasses import dataclass

from amopo_fast.memory.estimate import Estimate, Row
from amopo_fast.memory.gpus import Gpu

# Assumed, and printed as such. 0.4 of the dense peak is what well-tuned trainers report for dense models of this size.
EFFICIENCY = 0.40


@dataclass(frozen=True)
class Time:
    """Seconds of one micro-batch with its share of the optimizer's step."""

    compute: float
    to_device: float  # of the copies alone, of each direction
    to_host: float
    exposed: float  # of the copies, what the computation waits for

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def hides(self) -> bool:
        """Whether the copies cost less than 5 % of the speed that the run would have without them."""
        return self.exposed <= 0.05 * self.compute


def time_of(prediction: Estimate, gpu: Gpu, efficiency: float = EFFICIENCY) -> Time | None:
    """Of a micro-batch; None if the GPU's peak is not known.

    Each pass lasts as long as its computation or its copies of one direction, whichever takes longest; the first
    layer's weights, and the last write-back, are taken to have nothing beside them.
    """
    if not gpu.flops:
        return None
    rate, traffic = gpu.flops * efficiency, prediction.traffic
    compute = prediction.flops / rate
    forward = min(prediction.forward_flops / rate, compute)
    exposed = traffic.first / gpu.to_device + traffic.first / gpu.to_host
    for seconds, inward, outward in (
        (forward, traffic.forward_in, traffic.forward_out),
        (compute - forward, traffic.backward_in, traffic.backward_out),
    ):
        exposed += max(0.0, inward / gpu.to_device - seconds, outward / gpu.to_host - seconds)
    return Time(compute, traffic.to_device / gpu.to_device, traffic.to_host / gpu.to_host, exposed)


def tokens_per_second(prediction: Estimate, row: Row, gpu: Gpu, gpus: int = 1, efficiency: float = EFFICIENCY) -> float:
    """Computed tokens/s over all GPUs, each with a micro-batch of its own; 0.0 if the GPU's peak is not known."""
    time = time_of(prediction, gpu, efficiency)
    return gpus * row.tokens / time.total if time else 0.0

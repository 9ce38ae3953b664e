"""GPUs: their memory, their peak, and how fast they copy from and to pinned host memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from amopo_fast.errors import OptionError

GIB = 2**30
# Assumed of a card that is not here, bytes/s each way: of the 31.5 and 63 GB/s of 16 lanes what pinned copies reach. An
# H100 copied 53.0 GB/s in and 42.0 out (benchmarks/results/machine-nvidia-h100-80gb-hbm3.json).
PCIE4, PCIE5 = 25e9, 50e9


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that a process can allocate, context included. flops: dense bfloat16 peak (data sheet), 0 if
    unknown. to_device, to_host: bytes/s of pinned copies, where `measured` is false assumed."""

    name: str
    memory: int
    flops: float
    to_device: float
    to_host: float
    measured: bool = False


# 5090: 32607 MiB and 209.5 TFLOP/s with float32 sums, of NVIDIA's architecture paper
GPUS = {
    name: Gpu(name, int(gib * GIB), tflops * 1e12, pcie, pcie)
    for name, gib, tflops, pcie in (
        ("b200", 178.0, 2250, PCIE5),
        ("h200", 139.0, 989, PCIE5),
        ("h100", 79.0, 989, PCIE5),
        ("a100-80", 79.0, 312, PCIE4),
        ("l40s", 44.4, 362, PCIE4),
        ("a100-40", 39.4, 312, PCIE4),
        ("5090", 31.3, 209.5, PCIE5),
        ("4090", 23.5, 165, PCIE4),
    )
}


def parse_gpu(text: str) -> Gpu:
    """A name of GPUS, or a number of GiB (then without a known speed).

    Raises:
        OptionError: neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text.lower().removesuffix("gib").removesuffix("gb"))
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**20:  # NaN too
        raise OptionError(f"--gpu {text}: give GiB, here for this machine's, or one of {', '.join(GPUS)}", "gpu")
    return Gpu(f"{gib:g} GiB", int(gib * GIB), 0.0, PCIE4, PCIE4)


def known_peak(device_name: str) -> float:
    """Dense bfloat16 peak, FLOP/s, of a card by its driver's name, "NVIDIA H100 80GB HBM3"; 0 if unknown."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu.flops for name, gpu in GPUS.items() if name.split("-")[0] in words), 0.0)


def gpu_here(device: torch.device, *, copies: bool) -> Gpu:
    """A GPU of this machine with what is free of it. copies: measure, in 0.1 s, how fast its pinned copies are."""
    name = torch.cuda.get_device_name(device)
    free, flops = torch.cuda.mem_get_info(device)[0], known_peak(name)
    if copies:
        return Gpu(name, free, flops, *measure_copies(device), measured=True)
    return Gpu(name, free, flops, PCIE4, PCIE4)


def measure_copies(device: torch.device, seconds: float = 0.1, size: int = 2**26) -> tuple[float, float]:
    """(to the device, to the host), bytes/s of copies of `size` bytes of pinned memory, in about `seconds` together.

    A CPU's are copies between two buffers.
    """
    cuda = device.type == "cuda"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def rate(destination: torch.Tensor, source: torch.Tensor) -> float:
        copies, begin = -1, 0.0  # the first is not timed
        while copies < 1 or time.perf_counter() - begin < seconds / 2:
            destination.copy_(source, non_blocking=True)
            if cuda:
                torch.cuda.synchronize(device)
            copies += 1
            begin = begin or time.perf_counter()
        return copies * size / (time.perf_counter() - begin)

    return rate(there, host), rate(host, there)

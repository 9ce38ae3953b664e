"""The machine as it is found: clocks, copy and matmul rates, host transfers. The ceilings that NOTES.md divides by.

    PYTHONPATH=.:kernels python benchmarks/machine.py --out machine.json

Nothing of the card is set: it is measured as found.
"""

from __future__ import annotations

import subprocess

import torch

import harness

GIB = 2**30
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu",
          "clocks_throttle_reasons.active")  # fmt: skip


def clocks() -> dict[str, str]:
    """What nvidia-smi says now, by its names; {} where it is not there."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(CLOCKS, values, strict=False))


def host_buffer(size: int, cuda: bool) -> torch.Tensor:
    return torch.ones(size, dtype=torch.int8, pin_memory=cuda)


def variants(device: str, smoke: bool) -> dict[str, tuple[float, str, harness.Variant]]:
    """name -> (work of one run, its unit, the run)."""
    cuda = device.startswith("cuda")
    n = 128 if smoke else 8192
    size = 2**20 if smoke else 4 * GIB
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.int8, device=device).random_(0, 100) for _ in range(2))
    part = size // 4
    host, back = host_buffer(part, cuda), host_buffer(part, cuda)
    return {
        f"matmul {n}^3": (2.0 * n**3, "flop", lambda _: a @ b),
        "copy on the device": (2.0 * size, "bytes", lambda _: target.copy_(source)),
        "host to device, pinned": (float(part), "bytes", lambda _: target[:part].copy_(host, non_blocking=True)),
        "device to host, pinned": (float(part), "bytes", lambda _: back.copy_(source[:part], non_blocking=True)),
    }


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    report = harness.Report("machine", arguments)
    cuda = arguments.device.startswith("cuda")
    report.add(case="clocks", variant="as found", status="ok", **clocks())
    todo = variants(arguments.device, arguments.smoke)
    for name, (work, unit, run) in todo.items():
        times = harness.measure({name: run}, [None], device=arguments.device, rounds=5 if cuda else 2)[name]
        rate = {f"{unit}_per_s": work / (times["median_ms"] / 1e3)}
        report.add(case="rates", variant=name, status="ok", **rate, **times)
    report.add(case="clocks", variant="after the matmuls", status="ok", **clocks())


if __name__ == "__main__":
    main()

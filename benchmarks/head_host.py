"""The head's time on the device and on the host, apart: the same call as it is, and replayed from a CUDA graph.

    python benchmarks/head_host.py --out head_host.json

`host_ms`: until the call returns, the device being idle when it begins. A call that takes longer than its replay is
bound by the host, which launches its kernels. `direct`: past Triton's launcher (head/direct_launch.py). Without a GPU:
CPU time of a call of case B whose launches end in a driver that does nothing (tests/kernels/absent_driver.c).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import harness
from amopo_kernels.head import direct_launch
from head import CASES, modes, problems, runner

TIMED = ("ours, fused", "ours, chunked")


def host_ms(run: harness.Variant, inputs, rounds: int) -> float:
    """Median time until the call returns."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(inputs)
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def on_no_device(mode: str, rounds: int) -> dict[str, dict[str, float]]:
    """{"triton", "direct"} -> CPU time of a call in milliseconds, compared in all that is launched."""
    tests = harness.ROOT / "tests" / "kernels"
    sys.path.append(str(tests))
    from absent_driver import environment

    with tempfile.TemporaryDirectory() as folder:
        variables = environment(Path(folder))
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, tests / "head" / "launches_without_device.py", folder, mode, "--rounds", str(rounds)]
        child = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    if found["different"]:
        raise RuntimeError(f"a direct launch differs from Triton's: {found['different'][0]}")
    return {way: {"host_cpu_ms": taken["min"], "median_host_cpu_ms": taken["median"]}
            for way, taken in found["cpu_ms"].items()}  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    report = harness.Report("head_host", arguments)
    deadline = harness.Deadline(arguments.minutes)
    if not arguments.device.startswith("cuda"):
        # Not of a cache: what a copy of its statistics takes on a CPU is a launch on a GPU.
        for mode in ("exact",) if arguments.smoke else ("exact", "frozen"):
            for way, found in on_no_device(mode, 20 if arguments.smoke else 400).items():
                report.add(case="B", mode=mode, variant=f"ours, fused, {way}", status="ok", **found)
        return
    for case in CASES["cuda"][1::-1]:  # B, where launches are most of the time, then A
        (given, *_), _ = problems(case, arguments.device)
        frozen = dataclasses.replace(given, weight=given.weight.detach())
        for mode in modes(case)[:3]:
            inputs = frozen if mode.frozen else given
            runs, rows = {}, {}
            for variant in mode.variants(arguments.device):
                if not variant.name.startswith(TIMED):
                    continue
                if deadline.over():
                    return
                run = runner(variant.build(), mode)
                run(inputs)
                directly = mock.patch.object(direct_launch, "ENABLED", True)(run)
                directly(inputs)
                direct, graph = f"{variant.name}, direct", f"{variant.name}, graph"
                rows |= {variant.name: {"host_ms": host_ms(run, inputs, 7)}, graph: {},
                         direct: {"host_ms": host_ms(directly, inputs, 7)}}  # fmt: skip
                runs |= {variant.name: run, direct: directly, graph: harness.graph_of(run, inputs)}
            times = harness.measure(runs, [inputs], device=arguments.device, rounds=min(arguments.rounds, 7))
            for name, found in rows.items():
                report.add(case=case.name, mode=mode.name, variant=name, status="ok", **found, **times[name])


if __name__ == "__main__":
    main()

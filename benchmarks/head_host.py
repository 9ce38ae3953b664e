"""The head's time on the device and on the host, apart: the same call as it is, and replayed from a CUDA graph.

    python benchmarks/head_host.py --out head_host.json

`host_ms`: until the call returns, the device being idle when it begins. A call that takes longer than its replay is
bound by the host, which launches its kernels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

import harness
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


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    report = harness.Report("head_host", arguments)
    deadline = harness.Deadline(arguments.minutes)
    cuda = arguments.device.startswith("cuda")
    for case in CASES["cuda"][1::-1]:  # B, where launches are most of the time, then A
        if not cuda:
            report.add(case=case.name, variant="all", status="not run: needs a CUDA device")
            continue
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
                graph = f"{variant.name}, graph"
                rows |= {variant.name: {"host_ms": host_ms(run, inputs, 7)}, graph: {}}
                runs |= {variant.name: run, graph: harness.graph_of(run, inputs)}
            times = harness.measure(runs, [inputs], device=arguments.device, rounds=min(arguments.rounds, 7))
            for name, found in rows.items():
                report.add(case=case.name, mode=mode.name, variant=name, status="ok", **found, **times[name])


if __name__ == "__main__":
    main()

"""The head's time on the device and on the host, apart: the same call as it is, and replayed from a CUDA graph.

    python benchmarks/head_host.py --out head_host.json

`host_ms`: until the call returns, the device being idle when it begins. A call that takes longer than its replay is
bound by the host, which launches its kernels.
"""

from __future__ import annotations

import statistics
import time

import torch

import harness
from head import CASES, Mode, modes, problems, runner
from head_variants import ours

BACKENDS = ("fused", "chunked")


def replay(run: harness.Variant, inputs) -> harness.Variant:
    """`run` of these inputs, captured; whatever inputs it is called with."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(inputs)

    def replayed(_):
        graph.replay()
        return kept

    return replayed


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
        inputs, _ = problems(case, arguments.device)
        for mode in modes(case)[:3]:
            runs, rows = {}, {}
            for backend in BACKENDS:
                if deadline.over():
                    return
                options = {"logits_cache_bytes": int(2.1 * case.N * case.V)} if mode.name == "cached" else {}
                run = runner(ours(backend, **options)(), Mode(mode.name, mode.variants, frozen=mode.frozen))
                given = inputs[0]
                if mode.frozen:
                    given = given.__class__(**{**vars(given), "weight": given.weight.detach()})
                run(given)
                name = f"ours, {backend}"
                rows[name] = {"host_ms": host_ms(run, given, 7)}
                runs[name] = run
                rows[f"{name}, graph"] = {}
                runs[f"{name}, graph"] = replay(run, given)
            times = harness.measure(runs, [given], device=arguments.device, rounds=min(arguments.rounds, 7))
            for name, found in rows.items():
                report.add(case=case.name, mode=mode.name, variant=name, status="ok", **found, **times[name])


if __name__ == "__main__":
    main()

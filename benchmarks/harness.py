"""What all benchmarks share: interleaved timing, peak memory, and a JSON report written row by row.

A variant is a function of an input set that returns the tensors it made. Variants take turns in every round, so that
a clock that drifts meets them all alike; input sets rotate, and on a GPU the L2 cache is overwritten before every run.
Times are in milliseconds, memory in bytes. On a GPU times come from CUDA events and memory from torch's allocator; on
a CPU from the wall clock and from the process's peak resident size (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn", "trl", "torchao",
            "bitsandbytes", "peft", "nvidia-cutlass-dsl", "numpy")  # fmt: skip

Variant = Callable[[Any], Any]


# ----- command line -----


def parser(description: str) -> argparse.ArgumentParser:
    """The options that gpu_suite.py passes to every benchmark."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, help="JSON file to write; rewritten after every row")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--minutes", type=float, default=10.0, help="start no new measurement after this long")
    result.add_argument("--rounds", type=int, default=20, help="timed runs of every variant")
    result.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs; its times mean nothing")
    return result


class Deadline:
    """Time left of `minutes`, counted from here."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def over(self) -> bool:
        return self.seconds_left() <= 0


# ----- report -----


def environment(device: str) -> dict[str, Any]:
    """Hardware, driver, versions and commit. AMOPO_COMMIT names the commit where the sources lie without their .git."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("AMOPO_COMMIT") or _git_commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of other programs, at the start
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
    return result


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _git_commit() -> str | None:
    commit = _output(["git", "rev-parse", "HEAD"])
    return f"{commit}+changes" if commit and _output(["git", "status", "--porcelain", "-uno"]) else commit


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Report:
    """A JSON file {"benchmark", "environment", "arguments", "rows"}, complete after every `add`."""

    def __init__(self, benchmark: str, arguments: argparse.Namespace):
        self._path: Path = arguments.out
        self._places: dict[str, int] = {}  # of rows that were put, by key
        options = {name: value for name, value in vars(arguments).items() if name != "out"}
        self._content: dict[str, Any] = {
            "benchmark": benchmark,
            "environment": environment(arguments.device),
            "arguments": options,
            "rows": [],
        }
        self._write()

    def add(self, **row: Any) -> None:
        """Append a row and print its gist. `status` is "ok", "not run: REASON" or "wrong: WHAT"."""
        self._content["rows"].append(row)
        self._say(row)

    def put(self, key: str, **row: Any) -> None:
        """`add`, in the place of the row that was put by that key before."""
        if key in self._places:
            self._content["rows"][self._places[key]] = row
        else:
            self._places[key] = len(self._content["rows"])
            self._content["rows"].append(row)
        self._say(row)

    def _say(self, row: dict[str, Any]) -> None:
        self._write()
        gist = [str(row[name]) for name in ("case", "mode", "variant", "status") if name in row]
        if "median_ms" in row:
            gist.append(f"{row['median_ms']:.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})")
        if row.get("extra_memory_bytes") is not None:
            gist.append(f"{row['extra_memory_bytes'] / 2**20:.0f} MiB extra")
        print(" | ".join(gist), flush=True)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._content, indent=1) + "\n")
        partial.replace(self._path)


# ----- time -----


def measure(
    variants: dict[str, Variant],
    inputs: Sequence[Any],
    *,
    device: str,
    rounds: int = 20,
    warmup: int = 3,
    deadline: Deadline | None = None,
) -> dict[str, dict[str, Any]]:
    """Time every variant `rounds` times, in turns.

    Args:
        inputs: input sets; round r uses number r mod len(inputs). Variants must not change them.

    Returns:
        per variant {"median_ms", "p20_ms", "p80_ms", "min_ms", "runs"}, on a CPU also "min_cpu_ms" and "median_cpu_ms"
        of a run's CPU time, which tell something where other programs share the cores. After the deadline no new round
        begins, but one round is always run.
    """
    cuda = device.startswith("cuda")
    flush = None
    if cuda:
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        flush = torch.empty(size, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    cpu_times: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        for run in range(warmup):
            variants[name](inputs[run % len(inputs)])
    names = list(variants)
    for round_ in range(rounds):
        if round_ and deadline is not None and deadline.over():
            break
        # Another one begins every round: none always runs after the same neighbour on a warm or a cold chip.
        for offset in range(len(names)):
            name = names[(round_ + offset) % len(names)]
            elapsed, cpu = _time(variants[name], inputs[round_ % len(inputs)], flush)
            times[name].append(elapsed)
            cpu_times[name].append(cpu)
    results = {name: summary(values) for name, values in times.items()}
    if not cuda:
        for name, values in cpu_times.items():
            results[name] |= {"min_cpu_ms": min(values), "median_cpu_ms": statistics.median(values)}
    return results


def _time(variant: Variant, inputs: Any, flush: torch.Tensor | None) -> tuple[float, float]:
    """(elapsed on the device, CPU time of this process), milliseconds."""
    if flush is None:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        outputs = variant(inputs)
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
        del outputs
        return 1e3 * elapsed, 1e3 * cpu
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush.zero_()
    cpu_begin = time.process_time()
    start.record()
    outputs = variant(inputs)
    end.record()
    torch.cuda.synchronize()
    cpu = time.process_time() - cpu_begin
    del outputs
    return start.elapsed_time(end), 1e3 * cpu


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Of times in milliseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
        "min_ms": ordered[0],
        "runs": len(ordered),
    }


def graph_of(variant: Variant, inputs: Any) -> Variant:
    """The variant replayed as a CUDA graph over one input set, whatever it is called with."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            variant(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = variant(inputs)

    def replay(_):
        graph.replay()
        return outputs

    return replay


# ----- memory -----


def extra_memory(variant: Variant, inputs: Any, *, device: str) -> int | None:
    """Peak bytes above the inputs and above what `variant` returns; run it once before, so that caches exist.

    None where it cannot be measured. A CPU figure is the growth of the resident size and carries an error of megabytes.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = variant(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _bytes(outputs)
    _return_freed_pages()
    if not _reset_peak_resident():
        return None
    before = _resident("VmRSS")
    outputs = variant(inputs)
    return max(_resident("VmHWM") - before - _bytes(outputs), 0)


def _bytes(tensors: Any) -> int:
    flat = [x for x in torch.utils._pytree.tree_leaves(tensors) if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in flat}
    return sum(storages.values())


def _return_freed_pages() -> None:
    """glibc keeps freed blocks of up to 32 MiB resident; a variant that reused them would seem to need less."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_resident() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


# ----- accuracy -----


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference|| in float64; NaN where either is."""
    difference = (value.double() - reference.double()).norm()
    return (difference / reference.double().norm()).item()

"""Run the GPU tests and all benchmarks in order of importance, within a number of minutes.

    python benchmarks/gpu_suite.py --minutes 9 --out DIR [--only NAME ...] [--smoke]

Every entry is a process of its own: one that fails or hangs costs its own result alone. DIR gets suite.json (status and
report of every entry, rewritten after each; a report's rows are there as far as it came), suite.log (all output) and,
while an entry runs, NAME.json. `python benchmarks/tables.py --add DIR/suite.json` files the reports under results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import ROOT, Deadline, environment


@dataclass(frozen=True)
class Entry:
    name: str
    command: str  # in the repository's root; a benchmark also gets --out, --minutes, --device and --smoke
    minutes: float  # at most


SANITIZER = "compute-sanitizer --error-exitcode 1 --target-processes all"
# In order of importance. A new benchmark is one line here; it takes its options from harness.parser.
SUITE = [
    Entry("tests", "python -m pytest -m gpu tests", 4),
    Entry("head", "python benchmarks/head.py", 6),
    Entry("loss", "python benchmarks/loss.py", 1),
    Entry("step", "python benchmarks/step.py --model 7B", 8),
    # On a GPU the kernels' other tests run on it as well, instead of in the interpreter.
    Entry("kernel_tests", "python -m pytest tests/kernels", 6),
    Entry("head_sweeps", "python benchmarks/head.py --sweeps", 8),
    Entry("memory_32B", "python benchmarks/memory.py --model 32B", 9),
    Entry("memory_7B", "python benchmarks/memory.py --model 7B", 9),
    Entry("memory_14B", "python benchmarks/memory.py --model 14B", 9),
    Entry("memory_0.5B", "python benchmarks/memory.py --model 0.5B", 4),
    Entry("step_0.5B", "python benchmarks/step.py --model 0.5B", 4),
    Entry("step_14B", "python benchmarks/step.py --model 14B", 8),
    Entry("step_short", "python benchmarks/step.py --model 7B --data short", 6),
    Entry("step_long", "python benchmarks/step.py --model 7B --data long", 8),
    Entry("optimizers", "python benchmarks/optimizers.py", 9),
    Entry("memcheck", f"{SANITIZER} --tool memcheck python -m pytest -m gpu tests/kernels", 8),
    Entry("racecheck", f"{SANITIZER} --tool racecheck python -m pytest -m gpu tests/kernels", 8),
    Entry("quality", "python benchmarks/quality.py", 12),
]
MINIMUM_SECONDS = 15  # what an entry is begun for
GRACE_SECONDS = 20  # beyond its minutes, for the measurement in hand


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[entry.name for entry in SUITE], metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; on the CPU where there is no GPU")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.smoke:
        parser.error("there is no CUDA device here; --smoke runs tiny shapes on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(arguments.minutes)
    suite = {"environment": environment(device), "smoke": arguments.smoke, "entries": {}}
    for entry in SUITE:
        if arguments.only and entry.name not in arguments.only:
            continue
        suite["entries"][entry.name] = result = run(entry, arguments, device, deadline)
        (arguments.out / "suite.json").write_text(json.dumps(suite, indent=1) + "\n")
        print(f"{entry.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
    failed = [name for name, result in suite["entries"].items() if result["status"].startswith("failed")]
    return 1 if failed else 0


def run(entry: Entry, arguments: argparse.Namespace, device: str, deadline: Deadline) -> dict:
    """{"status": "ok", "failed: ...", "stopped: ..." or "not run: ...", "seconds", "report"}."""
    left = min(60 * entry.minutes, deadline.seconds_left() - GRACE_SECONDS)
    if left < MINIMUM_SECONDS:
        return {"status": "not run: no time left", "seconds": 0.0, "report": None}
    command = [sys.executable if word == "python" else word for word in entry.command.split()]
    if shutil.which(command[0]) is None:
        return {"status": f"not run: {command[0]} is not installed", "seconds": 0.0, "report": None}
    report = arguments.out / f"{entry.name}.json"
    if " benchmarks/" in entry.command:
        command += ["--out", str(report), "--minutes", str(left / 60), "--device", device]
        command += ["--smoke"] if arguments.smoke else []
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with open(arguments.out / "suite.log", "a") as log:
        log.write(f"===== {entry.name}: {' '.join(command)}\n")
        log.flush()
        child = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            code = child.wait(left + GRACE_SECONDS)
            status = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # what it started, too: nothing may stay on the GPU
            child.wait()
            status = f"stopped: after {left + GRACE_SECONDS:.0f} s"
    content = None
    if report.exists():
        content = json.loads(report.read_text())
        report.unlink()
    return {"status": status, "seconds": time.monotonic() - begin, "report": content}


if __name__ == "__main__":
    sys.exit(main())

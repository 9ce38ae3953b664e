"""The GPU tests and benchmarks in order of value, each within its seconds.

    python benchmarks/gpu_suite.py --plan first --out DIR        tests, tuning: 6 minutes
    python benchmarks/gpu_suite.py --plan second --out DIR       head, step, attention: 5 minutes
    python benchmarks/gpu_suite.py --plan third --out DIR        memory, host time, ncu, memcheck: 4.5 minutes
    python benchmarks/gpu_suite.py --plan frontier --out DIR     14B and 32B from host memory: 7 minutes
    python benchmarks/gpu_suite.py --plan rest --minutes 90 --out DIR [--only NAME ...] [--smoke]

Every entry is a process of its own with a budget: one that fails, hangs or runs over costs its own result alone, and
what it had written by then is kept. NOTES.md has the prediction of every entry of all plans but `rest`, which goes into
the result. DIR gets suite.json (status, seconds, prediction and report of every entry, rewritten after each),
suite.log (all output) and, while an entry runs, NAME.json. `python benchmarks/tables.py --add DIR/suite.json` files the
reports under results/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
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
    seconds: float  # at most; then it is killed
    smoke: bool = True  # False: minutes in the interpreter


# Its kernel is off by default and little tried: if it hangs, nothing else may hang with it.
WARP_SPECIALIZED = "tests/kernels/head/test_warp_specialized.py"
# Several processes at once: most of a test's time on a GPU is the host's, which compiles.
PYTEST = "python -m pytest -p failures_at_once"  # an entry whose time is over has told what failed by then
GPU_TESTS = f"{PYTEST} -m gpu"
# A whole step is compiled in each of the tests of memory, which then takes most of a minute beside fifteen others; a
# killed run is four processes one after another.
KILLED_RUN = "tests/survival/test_resume_gpu.py"
LONG_RUNS = "tests/memory tests/survival/test_fsdp_gpu.py"
SHORT_RUNS = "tests --ignore tests/kernels --ignore tests/memory --ignore tests/survival"
# On a GPU the kernels' tests without its marker run on it as well, instead of in the interpreter.
KERNEL_TESTS = f"{PYTEST} -n 14 --timeout 35 --session-timeout 30 --ignore {WARP_SPECIALIZED} tests/kernels"
SANITIZER = "compute-sanitizer --error-exitcode 1 --target-processes all"
SMALL_TESTS = "tests/kernels/head/test_triton_head_edges.py tests/kernels/rows"
SECTIONS = "SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats".split()
NCU = (
    "ncu --clock-control none --kernel-name regex:_(score|d_weight|d_hidden)_kernel --launch-count 7 "
    + " ".join(f"--section {section}" for section in SECTIONS)
)
PLANS = {
    "first": [
        Entry("machine", "python benchmarks/machine.py", 15),
        Entry("gpu_tests", f"{GPU_TESTS} -n 12 --session-timeout 50 --ignore {WARP_SPECIALIZED} tests/kernels", 60),
        Entry("gpu_runs", f"{GPU_TESTS} -n 12 --session-timeout 40 {SHORT_RUNS}", 50),
        Entry("gpu_estimates", f"{GPU_TESTS} -n 16 {LONG_RUNS}", 60),
        Entry("warp_specialized", f"{GPU_TESTS} -n 4 {WARP_SPECIALIZED}", 60),
        Entry("kernel_tests", KERNEL_TESTS, 45, smoke=False),
        Entry("head_tuning", "python benchmarks/head_tuning.py --rounds 3 --only '^(?!warp)'", 50),
        Entry("optimizer_update", "python benchmarks/optimizer_update.py", 20),
    ],
    "second": [
        Entry("head_B", "python benchmarks/head.py --case B --few_peers --rounds 3", 40),
        Entry("head_A", "python benchmarks/head.py --case A --few_peers --rounds 3", 40),
        Entry("head_C", "python benchmarks/head.py --case C --few_peers --rounds 3", 45),
        Entry("step", "python benchmarks/step.py --model 7B --pairs 2 --quick --only reference --only unpadded "
              "--only side-shared --only 'fused head'", 60),
        Entry("step_2_layers", "python benchmarks/step.py --model 7B --layers 2 --pairs 4 --quick", 45),
        Entry("warp_specialized_times", "python benchmarks/head_tuning.py --rounds 3 --only '^(shipped|warp)'", 45),
        Entry("attention", "python benchmarks/attention.py", 25),
    ],
    "third": [  # what the two before leave of fifteen minutes
        Entry("host_states", "python benchmarks/memory.py --model 32B --layers 16 --only 4-bit --steps 4", 60),
        Entry("memory_14B", "python benchmarks/memory.py --model 14B --only 'in backward' --steps 3", 60),
        Entry("killed_run", f"{GPU_TESTS} -n 0 {KILLED_RUN}", 50),
        Entry("head_host", "python benchmarks/head_host.py", 40),
        Entry("ncu", f"{NCU} python benchmarks/head.py --case B --variant 'ours, fused' --mode forward+backward", 30),
        Entry("memcheck", f"{SANITIZER} --tool memcheck python -m pytest -x {SMALL_TESTS}", 30),
    ],
    "frontier": [  # each beside what it is compared with, on one card; whole models, which take minutes to make
        Entry("memory_14B_host", "python benchmarks/memory.py --model 14B --only 8-bit --steps 3", 160),
        Entry("memory_32B_host", "python benchmarks/memory.py --model 32B --only 'on the host' --steps 3", 260),
    ],
    "rest": [
        Entry("all_gpu_tests", f"{GPU_TESTS} -n 6 tests", 300),
        Entry("all_kernel_tests", f"{PYTEST} -n 14 tests/kernels", 600, smoke=False),
        Entry("head", "python benchmarks/head.py", 600),
        Entry("head_sweeps", "python benchmarks/head.py --sweeps", 600),
        Entry("step_7B", "python benchmarks/step.py --model 7B", 600),
        Entry("memory_32B", "python benchmarks/memory.py --model 32B", 600),
        Entry("memory_7B", "python benchmarks/memory.py --model 7B", 600),
        Entry("determinism", "python benchmarks/memory.py --model 7B --only '8-bit, in backward, recomputed'", 150),
        Entry("memory_0.5B", "python benchmarks/memory.py --model 0.5B", 300),
        Entry("step_0.5B", "python benchmarks/step.py --model 0.5B", 300),
        Entry("step_14B", "python benchmarks/step.py --model 14B", 600),
        Entry("step_short", "python benchmarks/step.py --model 7B --data short", 400),
        Entry("step_long", "python benchmarks/step.py --model 7B --data long", 600),
        Entry("optimizers", "python benchmarks/optimizers.py", 600),
        Entry("loss", "python benchmarks/loss.py --rounds 4", 60),
        Entry("racecheck", f"{SANITIZER} --tool racecheck python -m pytest tests/kernels/head", 600),
        Entry("quality", "python benchmarks/quality.py", 800),
    ],
}  # fmt: skip
MINUTES = {"first": 6, "second": 5, "third": 4.5, "frontier": 7, "rest": 60}
SMOKE_PATIENCE = 3  # with tiny shapes imports are all there is, and a machine without a GPU may be slow
MINIMUM_SECONDS = 10  # what an entry is begun for
START_SECONDS = 8  # of an entry, for its imports; a benchmark begins no measurement in its last ones


def predictions() -> dict[str, str]:
    """Entry -> what NOTES.md says of it, from the table whose first column names entries."""
    rows = re.findall(r"^\| `([\w.]+)` \| \d+ \| (.+?) \|", (ROOT / "benchmarks" / "NOTES.md").read_text(), re.M)
    return {name: text.strip() for name, text in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--minutes", type=float, help=f"of the whole plan; default: {MINUTES}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", metavar="NAME", help="entries of the plan; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; on the CPU where there is no GPU")
    arguments = parser.parse_args()
    plan = PLANS[arguments.plan]
    unknown = set(arguments.only or ()) - {entry.name for entry in plan}
    if unknown:
        parser.error(f"plan {arguments.plan} has no {', '.join(sorted(unknown))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.smoke:
        parser.error("there is no CUDA device here; --smoke runs tiny shapes on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    minutes = arguments.minutes or MINUTES[arguments.plan] * (SMOKE_PATIENCE if arguments.smoke else 1)
    deadline = Deadline(minutes)
    suite = {"environment": environment(device), "plan": arguments.plan, "smoke": arguments.smoke, "entries": {}}
    expected = predictions()
    for entry in plan:
        if arguments.only and entry.name not in arguments.only:
            continue
        result = {"prediction": expected.get(entry.name), **run(entry, arguments, device, deadline)}
        suite["entries"][entry.name] = result
        (arguments.out / "suite.json").write_text(json.dumps(suite, indent=1) + "\n")
        print(f"{entry.name}: {result['status']}, {result['seconds']:.0f} of {entry.seconds:.0f} s", flush=True)
    failed = [name for name, result in suite["entries"].items() if result["status"].startswith(("failed", "stopped"))]
    return 1 if failed else 0


def run(entry: Entry, arguments: argparse.Namespace, device: str, deadline: Deadline) -> dict:
    """{"status": "ok", "failed: ...", "stopped: ..." or "not run: ...", "seconds", "report"}."""
    patience = SMOKE_PATIENCE if arguments.smoke else 1
    left = min(entry.seconds * patience, deadline.seconds_left())
    if arguments.smoke and not entry.smoke:
        return {"status": "not run: too long for a smoke test", "seconds": 0.0, "report": None}
    if left < MINIMUM_SECONDS:
        return {"status": "not run: no time left", "seconds": 0.0, "report": None}
    command = [sys.executable if word == "python" else word for word in shlex.split(entry.command)]
    if shutil.which(command[0]) is None:
        return {"status": f"not run: {command[0]} is not installed", "seconds": 0.0, "report": None}
    report = arguments.out / f"{entry.name}.json"
    if " benchmarks/" in entry.command:
        command += ["--out", str(report), "--minutes", str(max(left - START_SECONDS, 1) / 60), "--device", device]
        command += ["--smoke"] if arguments.smoke else []
    elif arguments.smoke and " pytest " in entry.command:  # all of them skip, for which one process imports enough
        command += ["-n", "0", "--session-timeout", str(left)]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        variables["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all the rest
    begin = time.monotonic()
    with open(arguments.out / "suite.log", "a") as log:
        log.write(f"===== {entry.name}: {' '.join(command)}\n")
        log.flush()
        child = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            code = child.wait(left)
            status = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped: after {left:.0f} s"
        # Whatever it started, too, and however it ended: nothing may stay on the GPU.
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
    content = None
    if report.exists():
        content = json.loads(report.read_text())
        report.unlink()
    return {"status": status, "seconds": time.monotonic() - begin, "report": content}


if __name__ == "__main__":
    sys.exit(main())

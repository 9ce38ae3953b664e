"""How long a command takes before its work begins, beside what its libraries alone take.

Every run is a process of its own on warm files; the commands take turns. Ratios are to `import torch,
transformers.tokenization_utils_base` in the same rounds, of elapsed time and of CPU time (children's user and system).
`--tree DIR` measures another checkout, for a before and an after.
"""

from __future__ import annotations

import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

BASE = "import torch, transformers"


def run(argv: list[str], tree: str, environment: dict[str, str], seconds: list[float], _inputs: object) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], cwd=tree, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr[-500:]}")
    seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=harness.ROOT, help="checkout whose commands are timed")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    arguments.tree = str(arguments.tree.resolve())
    report = harness.Report("startup", arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        side = '{{"response": "{}", "helpfulness": {}, "correctness": {}, "instruction_following": 3}}'
        line = '{{"prompt": "Which is it, {}?", "chosen": {}, "rejected": {}}}'
        lines = [line.format(i, side.format("This one.", 5, 4), side.format("That.", 2, 4)) for i in range(20)]
        data.write_text("\n".join(lines) + "\n")
        cli = ["-m", "amopo_fast.cli"]
        commands = {
            "python": ["-c", "pass"],
            BASE: ["-c", "import torch, transformers.tokenization_utils_base"],
            "--help": [*cli, "--help"],
            "validate": [*cli, "validate", str(data)],
            "show": [*cli, "show", str(data)],
            "train --help": [*cli, "train", "--help"],
        }
        if arguments.smoke:
            commands = {name: commands[name] for name in ("python", "--help")}
        paths = os.pathsep.join([arguments.tree, f"{arguments.tree}/kernels"])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        variants = {
            name: functools.partial(run, argv, arguments.tree, environment, seconds[name])
            for name, argv in commands.items()
        }
        rounds = 1 if arguments.smoke else arguments.rounds
        times = harness.measure(
            variants, [None], device="cpu", rounds=rounds, warmup=0 if arguments.smoke else 1,
            deadline=harness.Deadline(arguments.minutes),
        )  # fmt: skip
    base = "python" if arguments.smoke else BASE
    elapsed, work = times[base]["median_ms"], statistics.median(seconds[base])
    for name in commands:
        del times[name]["min_cpu_ms"], times[name]["median_cpu_ms"]  # of this process, which only waits
        cpu = statistics.median(seconds[name])
        report.add(case="start-up", variant=name, status="ok", **times[name], cpu_seconds=cpu,
                   elapsed_ratio=times[name]["median_ms"] / elapsed, cpu_ratio=cpu / work)  # fmt: skip


if __name__ == "__main__":
    main()

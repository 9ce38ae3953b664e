"""Every benchmark runs on a CPU with tiny shapes, and its report says so."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *command):
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than the rest
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


BENCHMARKS = [
    "loss.py",
    "head.py --case C --mode forward+backward",
    "step.py",
    "plan.py",
    "optimizers.py",
    "memory.py",
    "startup.py",
    "tokens.py",
]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark(tmp_path, command):
    file, *options = command.split()
    out = tmp_path / "report.json"
    run(tmp_path, f"benchmarks/{file}", *options, "--smoke", "--device", "cpu", "--out", str(out))
    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["torch"] and report["arguments"]["smoke"]
    timed = [row for row in report["rows"] if row["status"] == "ok"]
    assert timed and all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in timed)
    assert all(row["status"] == "ok" or row["status"].startswith("not run: ") for row in report["rows"])


def test_suite_writes_each_report_and_the_log(tmp_path):
    run(tmp_path, "benchmarks/gpu_suite.py", "--minutes", "2", "--smoke", "--only", "loss", "--out", str(tmp_path))
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["smoke"] and suite["entries"]["loss"]["status"] == "ok"
    assert suite["entries"]["loss"]["report"]["rows"][0]["variant"] == "torch"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite.json", "suite.log"]


def test_suite_survives_entries_that_fail_hang_are_absent_or_late(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite

    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0)
    monkeypatch.setattr(gpu_suite, "MINIMUM_SECONDS", 0.5)
    arguments = argparse.Namespace(out=tmp_path, smoke=True)
    deadline = gpu_suite.Deadline(1)
    statuses = [
        gpu_suite.run(gpu_suite.Entry(name, command, minutes), arguments, "cpu", deadline)["status"]
        for name, command, minutes in [
            ("fails", "python -c raise(SystemExit(3))", 1),
            ("absent", "no-such-tool benchmarks/loss.py", 1),
            ("hangs", "python -c __import__('time').sleep(600)", 1 / 60),
            ("late", "python -c pass", 0),
        ]
    ]
    assert statuses == [
        "failed: exit status 3",
        "not run: no-such-tool is not installed",
        "stopped: after 1 s",
        "not run: no time left",
    ]

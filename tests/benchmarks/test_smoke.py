"""Every benchmark runs on a CPU with tiny shapes, and its report says so."""

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


@pytest.mark.parametrize("command", ["loss.py", "head.py --case C --mode forward+backward"])
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

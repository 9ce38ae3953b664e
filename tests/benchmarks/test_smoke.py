"""Every benchmark runs on a CPU with tiny shapes, and its report says so."""

import argparse
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
from children import child_environment, run

ROOT = Path(__file__).resolve().parents[2]


def succeed(*command):
    done = run(*command, environment=child_environment(TORCHDYNAMO_DISABLE="1"))  # compiling takes longer than the rest
    assert done.returncode == 0, done.stdout + done.stderr


# Those that import little or change no global state run here, the others in a process of their own.
HERE = ["loss.py", "plan.py", "optimizer_update.py", "attention.py", "tokens.py"]
APART = ["machine.py", "head.py --case B --mode forward+backward", "step.py --quick", "optimizers.py",
         "memory.py --model 32B --steps 3 --only host", "startup.py", "head_cpu.py",
         pytest.param("shared_logps.py", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("command", HERE + APART)
def test_benchmark(tmp_path, monkeypatch, command):
    file, *options = command.split()
    if file == "shared_logps.py":
        pytest.importorskip("trl", reason="TRL is not installed")
    out = tmp_path / "report.json"
    options += ["--smoke", "--device", "cpu", "--out", str(out)]
    if command in HERE:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        monkeypatch.setattr(sys, "argv", [file, *options])
        runpy.run_path(str(ROOT / "benchmarks" / file), run_name="__main__")
    else:
        succeed(f"benchmarks/{file}", *options)
    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["torch"] and report["arguments"]["smoke"]
    timed = [row for row in report["rows"] if "median_ms" in row]
    assert timed and all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in timed)
    assert all(row["status"] == "ok" or row["status"].startswith("not run: ") for row in report["rows"])
    if file == "memory.py":  # as many slots as a run takes on a CPU, and as are asked for
        assert {row["variant"].rpartition("too")[2]: row["slots"] for row in timed} == {"": 2, ", 3 slots": 3}


def test_suite_writes_each_report_and_the_log(tmp_path):
    command = ["benchmarks/gpu_suite.py", "--plan", "rest", "--smoke", "--only", "loss", "--out", str(tmp_path)]
    succeed(*command)
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["smoke"] and suite["entries"]["loss"]["status"] == "ok"
    assert suite["entries"]["loss"]["report"]["rows"][0]["variant"] == "torch"
    assert suite["entries"]["loss"]["prediction"].startswith("one Triton launch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite.json", "suite.log"]


def test_suite_survives_entries_that_fail_hang_are_absent_or_late(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite

    monkeypatch.setattr(gpu_suite, "MINIMUM_SECONDS", 0.5)
    arguments = argparse.Namespace(out=tmp_path, smoke=False)
    deadline = gpu_suite.Deadline(1)
    begin = time.monotonic()
    statuses = [
        gpu_suite.run(gpu_suite.Entry(name, command, seconds), arguments, "cpu", deadline)["status"]
        for name, command, seconds in [
            ("fails", "python -c raise(SystemExit(3))", 60),
            ("absent", "no-such-tool benchmarks/loss.py", 60),
            ("hangs", 'python -c "import time; time.sleep(600)"', 1),
            ("late", "python -c pass", 0),
        ]
    ]
    assert statuses == [
        "failed: exit status 3",
        "not run: no-such-tool is not installed",
        "stopped: after 1 s",
        "not run: no time left",
    ]
    assert time.monotonic() - begin < 60  # nothing waited for what hung


def test_what_an_entry_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite

    child = f"import subprocess; print(subprocess.Popen(['sleep', '600']).pid, file=open('{tmp_path}/pid', 'w'))"
    entry = gpu_suite.Entry("leaves a child", f'python -c "{child}"', 60)
    arguments = argparse.Namespace(out=tmp_path, smoke=True)
    assert gpu_suite.run(entry, arguments, "cpu", gpu_suite.Deadline(1))["status"] == "ok"
    process = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    raise AssertionError("it still runs")


def test_every_entry_of_a_plan_has_its_prediction_and_the_plan_fits_its_minutes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite

    entries = [entry for plan in ("first", "second", "third", "frontier") for entry in gpu_suite.PLANS[plan]]
    known = {entry.name for plan in gpu_suite.PLANS.values() for entry in plan}
    assert {entry.name for entry in entries} <= set(gpu_suite.predictions()) <= known
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    for entry in entries:
        assert f"| `{entry.name}` | {entry.seconds} |" in notes
    for plan, minutes, piece in (("first", 6, 60), ("second", 5, 60), ("third", 4.5, 60), ("frontier", 7, 260)):
        seconds = [entry.seconds for entry in gpu_suite.PLANS[plan]]
        assert gpu_suite.MINUTES[plan] <= minutes and sum(seconds) <= 60 * minutes and max(seconds) <= piece

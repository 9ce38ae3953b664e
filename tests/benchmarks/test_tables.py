"""Tables come from the JSON alone, and the committed ones are up to date."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from children import child_environment

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "gpu": "NVIDIA H200", "driver": "580.1", "commit": "0123456789abcdef", "date": "2026-01-02",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
}  # fmt: skip
TIME = {"status": "ok", "median_ms": 37.25, "p20_ms": 37.0, "p80_ms": 37.5, "min_ms": 36.9, "runs": 20}
ROW = {"case": "A", "N": 4096, "H": 5120, "V": 152064, "mode": "forward+backward"}
REPORT = {
    "benchmark": "head",
    "environment": ENVIRONMENT,
    "arguments": {"smoke": False},
    "rows": [
        {**ROW, "variant": "ours, chunked", **TIME, "extra_memory_bytes": 200 * 2**20, "dx_error": 0.0012},
        {**ROW, "variant": "ours, chunked", **TIME, "mode": "forward", "median_ms": 9.5},
        {**ROW, "variant": "CCE", "status": "not run: ImportError: No module named 'cut_cross_entropy'"},
    ],
}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    yield module
    for name in ("tables", "harness", "head", "head_problem", "head_variants", "floors"):
        sys.modules.pop(name, None)


def suite(tmp_path, report):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"entries": {report["benchmark"]: {"report": report}, "loss": {"report": None}}}))
    return path


def test_without_results_a_table_says_so(tables):
    for name in ("head A", "head B", "head cpu", "sweeps", "floors", "loss", "quality", "real model"):
        assert "not measured" in tables.block(name)


def test_results_are_filed_by_device_and_shown(tables, tmp_path):
    (path,) = tables.add(suite(tmp_path, REPORT))
    assert path.name == "head-nvidia-h200.json"
    lines = tables.block("head A").splitlines()
    assert lines[2] == "| ours, chunked | 37.2 (37 to 37.5) | 9.5 (37 to 37.5) |  | 200 |  | 1.2e-03 |  |"
    assert lines[3].startswith("| CCE | not run |")
    assert "CCE: not run: ImportError: No module named 'cut_cross_entropy'." in lines
    assert lines[-1] == "NVIDIA H200, driver 580.1, torch 2.13.0, triton 3.7.1, commit 012345678, 2026-01-02."
    assert "| A | chunked, exact | 25.5 |" in tables.block("floors") and "37.2 (37 to 37.5)" in tables.block("floors")
    assert "not measured" in tables.block("head B")


def test_cpu_results_are_compared_with_plain_logits(tables, tmp_path):
    row = {**ROW, "case": "C", **TIME, "dx_error": 1e-7}
    rows = [
        {**row, "variant": "ours, torch", "min_ms": 90.0, "min_cpu_ms": 95.0, "extra_memory_bytes": 10 * 2**20},
        {**row, "variant": "plain logits", "min_ms": 100.0, "min_cpu_ms": 100.0, "extra_memory_bytes": 200 * 2**20},
    ]
    cpu = {"cpu": "AMD EPYC", "threads": 2, "versions": {}, "commit": None, "date": "2026-01-02"}
    (path,) = tables.add(suite(tmp_path, {**REPORT, "environment": cpu, "rows": rows}))
    assert path.name == "head-cpu.json"
    lines = tables.block("head cpu").splitlines()
    assert lines[2] == "| C: 4096, 5120, 152064 | ours, torch | 90 | 95 | 0.90 | 0.95 | 10 | 0.05 | 1.0e-07 |"
    assert lines[-1] == "AMD EPYC, 2 threads, commit unknown, 2026-01-02."


def test_a_block_is_replaced_and_its_surroundings_kept(tables):
    text = "before\n<!-- table: loss -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(text)
    assert filled.startswith("before\n<!-- table: loss -->\n| case |") and filled.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in filled and tables.fill(filled) == filled


def test_smoke_runs_are_not_filed(tables, tmp_path):
    report = copy.deepcopy(REPORT)
    report["arguments"]["smoke"] = True
    with pytest.raises(ValueError, match="smoke"):
        tables.add(suite(tmp_path, report))


def test_sweeps_are_tabled_and_plotted(tables, tmp_path, monkeypatch):
    plot = tmp_path / "results" / "sweeps.png"
    monkeypatch.setattr(tables, "PLOTTED", plot)
    rows = [
        {"case": f"{axis}={n}", "N": 4096, "H": 3584, "V": 152064, **{axis: n}, "variant": "ours, fused", **TIME}
        for axis in "NHV" for n in (1024, 4096)
    ]  # fmt: skip
    tables.add(suite(tmp_path, {**REPORT, "benchmark": "head_sweeps", "rows": rows}))
    assert "| forward+backward, ms | N=1024 | N=4096 | H=1024 |" in tables.block("sweeps")
    monkeypatch.setattr("sys.argv", ["tables.py"])
    monkeypatch.setattr(tables, "PAGES", [])
    tables.main()
    assert plot.stat().st_size > 10_000


def test_committed_tables_are_up_to_date():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

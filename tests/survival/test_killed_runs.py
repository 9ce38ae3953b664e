"""Runs that were killed at random moments and while saving end as the run that was left alone, bit for bit."""

import json
import re
from pathlib import Path

import pytest
from children import child_environment, run

SCRIPT = Path(__file__).with_name("kill_runs.py")


def attack(*options):
    """(kills, runs, kills in a save) of `kill_runs.py`, none of whose runs may differ."""
    done = run(str(SCRIPT), *map(str, options), environment=child_environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) kills of (\d+) runs, (\d+) while saving, 0 different", done.stdout)
    return tuple(map(int, counts.groups()))


def test_killed_runs_end_as_the_uninterrupted_one():
    kills, runs, saving = attack("--kills", 3, "--while_saving", 1)
    assert kills >= 3 and saving >= 1 and runs >= 3


@pytest.mark.slow
def test_104_kills_of_every_kind_of_run(record_property):
    kills, runs, saving = attack("--kills", 104, "--while_saving", 56, "--kills_of_a_run", 4, "--variants", "all")
    assert kills >= 104 and saving >= 56
    record_property("counts", {"kills": kills, "runs": runs, "while_saving": saving})


@pytest.mark.slow
def test_10_times_sigterm(record_property):
    kills, runs, _ = attack("--kills", 10, "--while_saving", 0, "--signal", "SIGTERM", "--variants", "all")
    assert kills >= 10
    record_property("counts", {"sigterms": kills, "runs": runs})


def test_the_page_has_the_counts_of_the_attack_on_record():
    root = SCRIPT.parents[2]
    page = " ".join((root / "docs" / "checkpoints.md").read_text(encoding="utf-8").split())
    for name, sentence in (("kill_runs-cpu", "{kills} SIGKILLs of {runs} runs, {while_saving} while saving,"),
                           ("kill_runs_sigterm-cpu", "and {kills} SIGTERMs of {runs} runs")):  # fmt: skip
        rows = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
        total = {key: sum(row[key] for row in rows) for key in ("kills", "runs", "while_saving", "different")}
        assert sentence.format(**total) in page and total["different"] == 0 and f"{name}.json" in page

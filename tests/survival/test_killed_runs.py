"""Runs that were killed at random moments and while saving end as the run that was left alone, bit for bit."""

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

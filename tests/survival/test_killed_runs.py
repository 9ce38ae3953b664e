"""Runs killed with SIGKILL at random moments and while saving end as the run that was left alone."""

import os
import re
from pathlib import Path

import pytest
from children import child_environment, run

SCRIPT = Path(__file__).with_name("kill_runs.py")


@pytest.mark.parametrize("options", [[], pytest.param(["--host"], marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_uninterrupted_one(options):
    """Three here; AMOPO_KILLED_RUNS=20 for as many as the project claims (about a minute and a half)."""
    runs = int(os.environ.get("AMOPO_KILLED_RUNS", "3"))
    environment = child_environment(OMP_NUM_THREADS="1")
    command = [str(SCRIPT), "--runs", str(runs), "--while_saving", str(max(1, runs // 4)), *options]
    done = run(*command, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    killed, saving, different = map(
        int, re.search(r"(\d+) runs killed, (\d+) .* (\d+) different", done.stdout).groups()
    )
    assert killed >= runs and saving >= max(1, runs // 4) and different == 0

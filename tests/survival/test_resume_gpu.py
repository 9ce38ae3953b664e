"""On a GPU: a run that was killed ends as the one that was left alone, bit for bit, with deterministic algorithms."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import child_environment

SCRIPT = Path(__file__).with_name("kill_runs.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_killed_runs_end_as_the_uninterrupted_one():
    command = [sys.executable, str(SCRIPT), "--device", "cuda", "--kills", "1", "--while_saving", "1"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("0 different")

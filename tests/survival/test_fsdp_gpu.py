"""FSDP2 through Trainer and `accelerate launch` on one GPU: against plain training, and resumed from its shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import child_environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(folder, *launcher):
    command = [sys.executable, *launcher, str(HERE / "gpu_fsdp.py"), str(folder)]
    environment = child_environment(HERE, CUDA_VISIBLE_DEVICES="0")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


def test_fsdp2_on_one_gpu_equals_plain_training_and_resumes(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml"),
                "--num_processes", "1")  # fmt: skip
    plain, sharded = run(tmp_path / "plain"), run(tmp_path / "sharded", *launcher)
    assert sharded["sharded"] and not plain["sharded"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert (tmp_path / "sharded" / "checkpoint-3" / "pytorch_model_fsdp_0" / ".metadata").exists()
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-6")
    assert run(tmp_path / "sharded", *launcher)["losses"] == pytest.approx(sharded["losses"], rel=1e-6)

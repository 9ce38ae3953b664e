"""The jobs for clusters: their shells' syntax, and the command that each node runs, with stand-ins for Slurm's own."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from amopo_fast.cli.options import parse_options
from amopo_fast.data.config import DataConfig
from amopo_fast.models.config import ModelConfig
from amopo_fast.training.config import AMoPOConfig

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm" / "two_nodes.sh"
SKY = yaml.safe_load((ROOT / "examples" / "skypilot" / "train.yaml").read_text())


def check_launch(words):
    """The words behind `accelerate` name options that accelerate and the trainer have."""
    from accelerate.commands.launch import launch_command_parser

    launch = launch_command_parser().parse_args(words[2:])
    assert (ROOT / launch.config_file).is_file() and launch.module and launch.training_script == "amopo_fast.cli"
    command, *rest = launch.training_script_args
    assert command == "train"
    data, _, config, _ = parse_options("train", (DataConfig, ModelConfig, AMoPOConfig), [*rest, "--use_cpu", "true"])
    assert data.train_data and config.resume_from_checkpoint == "auto" and not config.optim_in_backward
    return launch, config


@pytest.mark.parametrize("script", [SLURM.read_text(), SKY["setup"], SKY["run"]])
def test_a_shell_reads_it(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def slurm(tmp_path, accelerate):
    """Run the job with stand-ins; what they were called with, and the exit code."""
    log = tmp_path / "calls"
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; fi',
        "scancel": ":",
        "srun": 'SLURM_NODEID=1 "$@"',
        "accelerate": accelerate,
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> {log}\necho >> {log}\n{body}\n')
        path.chmod(0o755)
    job = {"ID": "5", "NODELIST": "node[7-8]", "NUM_NODES": "2"}
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "8",
                   **{f"SLURM_JOB_{name}": value for name, value in job.items()}}  # fmt: skip
    command = ["bash", str(SLURM), "examples/7b_lora.yaml", "--output_dir", "/shared/a run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [shlex.split(line) for line in log.read_text().splitlines()], done.returncode


def test_each_node_of_slurm_starts_its_share(tmp_path, monkeypatch):
    calls, code = slurm(tmp_path, "exit 4")
    assert code == 4 and ["scontrol", "requeue", "5"] not in calls
    [words] = [call for call in calls if call[0] == "accelerate"]
    monkeypatch.chdir(ROOT)
    launch, config = check_launch(words)
    assert (launch.num_machines, launch.machine_rank, launch.num_processes) == (2, 1, 16)
    assert (launch.main_process_ip, launch.rdzv_backend) == ("node7", "c10d")
    assert config.output_dir == "/shared/a run"


def test_a_job_that_slurm_warns_saves_and_goes_back_into_the_queue(tmp_path):
    # Slurm warns the batch script, which is srun's parent.
    calls, code = slurm(tmp_path, "kill -USR1 $(ps -o ppid= -p $PPID); sleep 1; exit 3")
    assert ["scancel", "--signal=TERM", "5"] in calls and calls[-1] == ["scontrol", "requeue", "5"] and code == 3


def test_skypilots_command_has_options_that_exist(monkeypatch):
    assert set(SKY) == {"resources", "workdir", "file_mounts", "setup", "run"}
    monkeypatch.chdir(ROOT)
    launch, config = check_launch(shlex.split(SKY["run"].replace("\\\n", " ")))
    assert launch.num_processes == int(SKY["resources"]["accelerators"].split(":")[1])
    assert config.output_dir.startswith(next(iter(SKY["file_mounts"])))

"""What launchers say by the environment: contradictions are named before torch waits for anyone."""

import socket

import pytest
import torch

from amopo_fast.cli import main
from amopo_fast.errors import OptionError
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.launch import check_launch

OF_RANK_0 = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
             "MASTER_PORT": "29511"}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Of a process that no launcher started."""
    for name in (*OF_RANK_0, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE='two' is no whole number of at least 1: .* unset it"),
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE='' is no whole number"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE='0' is no whole number of at least 1"),
        ({"RANK": "-1"}, "^RANK='-1' is no whole number of at least 0"),
        ({"RANK": "1.0"}, "^RANK='1.0' is no whole number"),
        ({"LOCAL_RANK": "gpu0"}, "^LOCAL_RANK='gpu0' is no whole number of at least -1"),
        ({"MASTER_PORT": "65536"}, "^MASTER_PORT='65536' is no whole number from 1 to 65535"),
        ({"RANK": "2"}, "^RANK=2 must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": None}, "^LOCAL_RANK=2 must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "^LOCAL_RANK=1 must be below LOCAL_WORLD_SIZE=1"),
        ({"WORLD_SIZE": None}, "^LOCAL_RANK=0 is set without WORLD_SIZE: start with torchrun"),
        ({"RANK": None}, "^LOCAL_RANK=0 is set without RANK:"),
        ({"LOCAL_RANK": None}, "^WORLD_SIZE=2 is set without LOCAL_RANK:"),
        ({"MASTER_ADDR": None}, "^LOCAL_RANK=0 is set without MASTER_ADDR:"),
        ({"MASTER_PORT": None, "MASTER_ADDR": ""}, "^LOCAL_RANK=0 is set without MASTER_ADDR, MASTER_PORT:"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, environment, changes, message):
    for name, value in {**OF_RANK_0, **changes}.items():
        environment.setenv(name, value) if value is not None else environment.delenv(name, raising=False)
    with pytest.raises(OptionError, match=message):
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True)


def test_a_host_that_is_not_known_is_named(environment, caplog):
    for name, value in OF_RANK_0.items():
        environment.setenv(name, value)
    check_launch()
    assert not caplog.records
    environment.setenv("MASTER_ADDR", "127.0.0.256")  # for which no server of names is asked
    environment.setattr(socket, "getaddrinfo", _unknown)
    check_launch()
    assert "MASTER_ADDR=127.0.0.256 is not known here (Name or service not known)" in caplog.text


def _unknown(host, *_):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_the_command_ends_with_2_before_it_looks_for_a_model(tmp_path, environment, capsys):
    environment.setenv("WORLD_SIZE", "2")
    argv = ["train", "--model_name_or_path", str(tmp_path / "none"), "--train_data", str(tmp_path / "none.json"),
            "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]  # fmt: skip
    assert main(argv) == 2
    assert "WORLD_SIZE=2 is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("alone", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "-1"}])
def test_one_process_that_says_so_is_one_process(tmp_path, environment, alone):
    for name, value in alone.items():
        environment.setenv(name, value)
    assert AMoPOConfig(output_dir=str(tmp_path), use_cpu=True).world_size == 1


def test_what_was_started_and_what_accelerate_makes_of_it_agree(tmp_path, environment):
    """torchrun or accelerate launch on a machine without GPUs: N runs into one folder, or no sharding."""
    if torch.cuda.is_available():
        pytest.skip("a machine without GPUs is meant")
    with environment.context() as launched:
        for name, value in {**OF_RANK_0, "LOCAL_RANK": "-1"}.items():  # else torch waits for the other one
            launched.setenv(name, value)
        with pytest.raises(ValueError, match="2 processes were started .*would train a run of its own.*set use_cpu"):
            AMoPOConfig(output_dir=str(tmp_path))
    for version, engine in (("2", "FSDP2"), ("1", "FSDP")):
        with environment.context() as launched:
            launched.setenv("ACCELERATE_USE_FSDP", "true")
            launched.setenv("FSDP_VERSION", version)
            with pytest.raises(ValueError, match=f"^{engine} was asked for, and on a CPU"):
                AMoPOConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize("asked, options", [("bf16", {"bf16": True}), ("no", {"bf16": True}), ("no", {})])
def test_a_precision_that_agrees(tmp_path, environment, asked, options):
    environment.setenv("ACCELERATE_MIXED_PRECISION", asked)
    args = AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert args.mixed_precision == ("bf16" if options else "no")


@pytest.mark.parametrize(
    "name, value, options, message",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}, "mixed_precision 'bf16' .* say no: .*set bf16: true"),
        ("ACCELERATE_MIXED_PRECISION", "FP16", {"bf16": True}, "mixed_precision 'fp16' .* say bf16: .*set fp16: true"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", {"bf16": True}, "mixed_precision 'fp8' .* bf16 and fp16 are known"),
        ("ACCELERATE_MIXED_PRECISION", "", {}, "mixed_precision '' .* bf16 and fp16 are known"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR.* use compile_layers"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {}, "=4, .* use pairs_per_step"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", {}, "is refused: Megatron-LM is not supported; use FSDP2"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, "shard the model with FSDP2"),
    ],
)
def test_what_accelerate_launch_asks_for_beside_the_options_is_refused(
    tmp_path, environment, name, value, options, message
):
    environment.setenv(name, value)
    with pytest.raises(OptionError, match=message):
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_accelerates_cpu_is_use_cpu(tmp_path, environment):
    environment.setenv("ACCELERATE_USE_CPU", "True")
    args = AMoPOConfig(output_dir=str(tmp_path))
    assert args.use_cpu and not args.bf16 and args.device.type == "cpu"

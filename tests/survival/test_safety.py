"""Nothing that a run reads runs code, nothing leaves its output folder, and no secret reaches what it writes."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from children import child_environment, run
from demo_folder import demo_folder
from payloads import Evil
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from amopo_fast.cli import main
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_model
from amopo_fast.survival.safety import redact, unreadable, write_arguments
from amopo_fast.training.config import AMoPOConfig

SECRET, HUB_TOKEN, OTHER = "hf_environmentsecret1234", "hf_argumentsecret5678", "wandbsecret0123456789"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return demo_folder(tmp_path_factory.mktemp("model"))


def test_secrets_reach_neither_files_nor_the_terminal(model_folder, tmp_path):
    output = tmp_path / "run"
    environment = child_environment(OMP_NUM_THREADS="1", HF_TOKEN=SECRET, WANDB_API_KEY=OTHER, HF_HUB_OFFLINE="1")
    command = ["-m", "amopo_fast.cli", "train", "--model_name_or_path", str(model_folder),
               "--train_data", str(HELDOUT_FILE), "--dimensions", *DIMENSIONS, "--output_dir", str(output),
               "--use_cpu", "true", "--max_steps", "2", "--save_steps", "1", "--pairs_per_step", "1",
               "--report_to", "none"]  # fmt: skip
    done = run(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    written = {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert any(name.endswith("training_args.json") for name in written)
    written["terminal"] = (done.stdout + done.stderr).encode()
    for name, content in written.items():
        for secret in (SECRET, OTHER):
            assert secret.encode() not in content, name
    assert not [name for name in written if name.endswith("training_args.bin")]


def test_secrets_among_the_options_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", OTHER)
    options = {"push_to_hub": True, "hub_token": HUB_TOKEN, "report_to": ["tensorboard"], "run_name": f"run of {OTHER}"}
    write_arguments(tmp_path, AMoPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **options))
    [text] = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert HUB_TOKEN not in text and OTHER not in text and "run of <$WANDB_API_KEY>" in text


def test_error_messages_are_redacted(monkeypatch, capsys):
    monkeypatch.setenv("DATA_PASSWORD", "correct-horse")
    assert main(["show", "/nowhere/user:correct-horse@host/pairs.json"]) == 1
    error = capsys.readouterr().err
    assert "correct-horse" not in error and "<$DATA_PASSWORD>" in error
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "rather-long")
    assert redact("rather-long") == "rather-long"


def save_sharded(folder, extra):
    dcp.save({"weight": torch.ones(3), "groups": extra}, storage_writer=dcp.FileSystemWriter(folder))


class Through:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_sharded_parts_are_read_without_running_code(tmp_path):
    save_sharded(tmp_path / "good" / "optimizer_0", [{"lr": 0.1, "betas": (0.9, 0.99)}])
    assert unreadable(tmp_path / "good") == ""
    save_sharded(tmp_path / "entry" / "optimizer_0", Evil(tmp_path / "owned"))
    assert not (tmp_path / "owned").exists()
    assert unreadable(tmp_path / "entry").startswith("optimizer_0/.metadata cannot be read without running code")
    shutil.copytree(tmp_path / "good", tmp_path / "index")
    (tmp_path / "index" / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    assert "io.open is not part of a checkpoint's index)" in unreadable(tmp_path / "index")
    # A member of an enumeration is written as getattr(class, name) by Python 3.11.2, Debian 12's.
    index, encoding = tmp_path / "index" / "optimizer_0" / ".metadata", _MEM_FORMAT_ENCODING
    index.write_bytes(pickle.dumps(Through(encoding, next(iter(encoding.__members__)))))
    assert "getattr" not in unreadable(tmp_path / "index")
    for of, name in ((torch.Size, "__subclasses__"), (encoding, "mro")):
        index.write_bytes(pickle.dumps(Through(of, name)))
        assert "builtins.getattr of what is no enumeration is not part" in unreadable(tmp_path / "index")
    assert not (tmp_path / "owned").exists()


def test_models_load_from_whole_safetensors_without_remote_code(model_folder, tmp_path):
    from amopo_fast.models.loading import model_errors

    def load(folder):
        with model_errors(str(folder)):
            args = AMoPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
            return load_model(ModelConfig(model_name_or_path=str(folder)), args, torch.float32)

    folder = Path(shutil.copytree(model_folder, tmp_path / "truncated"))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    with pytest.raises(ValueError, match="truncated.* cannot be loaded: .*deserializing.*whole .safetensors files"):
        load(folder)

    folder = Path(shutil.copytree(model_folder, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        load(folder)

    folder = Path(shutil.copytree(model_folder, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(ValueError, match="asks for code of the Hub, which is not run"):
        load(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/x", ".hidden"])
def test_names_in_configurations_stay_names(name):
    from amopo_fast.data.sources.spec import parse_sources

    with pytest.raises(ValueError, match="may hold letters"):
        parse_sources({name: "pairs.json"})

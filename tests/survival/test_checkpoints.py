"""Checkpoints: whole or not there; which one a run resumes from; what is refused, with its message."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_model, small_pairs, small_trainer
from transformers import TrainerCallback

from amopo_fast.errors import CheckpointError
from amopo_fast.survival import checkpoints
from amopo_fast.survival.checkpoints import complete_checkpoints, resolve
from amopo_fast.survival.manifest import MARKER, problem_of, read_marker, sealed

KEPT = ("loss", "learning_rate", "grad_norm", "eval_preference_loss", "train_loss", "epoch", "step")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps (the epochs end at 4 and 8) with all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    run = small_trainer(folder, save_total_limit=None)
    run.train()
    run.save_model()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT if key in line} for line in lines]


class At(TrainerCallback):
    """Calls `action` when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_a_checkpoint_lists_its_files_and_no_staging_folder_is_left(finished):
    found = complete_checkpoints(finished)
    assert [checkpoint.step for checkpoint in found] == [2, 4, 6, 8]
    marker = json.loads((found[0].path / MARKER).read_text())
    assert set(marker["files"]) == {path.name for path in found[0].path.iterdir()} - {MARKER}
    assert marker["files"]["model.safetensors"]["bytes"] == (found[0].path / "model.safetensors").stat().st_size
    assert not (finished / checkpoints.STAGING).exists()


def damage_no_marker(path):
    (path / MARKER).unlink()


def test_without_a_complete_checkpoint_last_is_refused_and_auto_starts_anew(copy, tmp_path, caplog):
    for checkpoint in complete_checkpoints(copy):
        damage_no_marker(checkpoint.path)
    with pytest.raises(CheckpointError, match="has no complete checkpoint to resume from; checkpoint-8: it has no"):
        resolve(copy, "last")
    assert resolve(copy, "auto") is None and "starting from the beginning" in caplog.text
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve(copy, str(tmp_path / "nowhere"))
    assert resolve(copy, None) is None


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_run_resumed_anywhere_has_the_same_weights_and_metrics_file(finished, copy, step):
    """Step 2 is inside a log window of three steps, 4 is an epoch's end with an evaluation, 8 the run's end."""
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "lo')  # whatever happened to it
    run = small_trainer(copy, save_total_limit=None)
    torch.manual_seed(99)
    result = run.train(resume_from_checkpoint=str(copy / f"checkpoint-{step}"))
    run.save_model()
    expected, found = (load_file(folder / "model.safetensors") for folder in (finished, copy))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(copy) == metrics(finished)
    assert result.training_loss == metrics(finished)[-1]["train_loss"]


def test_later_checkpoints_and_an_earlier_runs_metrics_are_set_aside(copy, finished, caplog):
    run = small_trainer(copy, save_total_limit=None, max_steps=3)
    run.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert sorted(path.name for path in (copy / "superseded" / "1").iterdir()) == [
        "checkpoint-4", "checkpoint-6", "checkpoint-8"]  # fmt: skip
    assert "moved to" in caplog.text
    small_trainer(copy, max_steps=1).train()
    assert (copy / "superseded" / "2" / "metrics.jsonl").exists()
    assert "checkpoint-2" in {path.name for path in (copy / "superseded" / "3").iterdir()}


def test_resuming_the_end_of_a_run_that_stopped_inside_an_epoch_trains_no_further(tmp_path):
    small_trainer(tmp_path, max_steps=3).train()
    before = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    run = small_trainer(tmp_path, max_steps=3)
    assert run.train(resume_from_checkpoint="last").global_step == 3
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters() if name in before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": small_pairs(15)}, "data: pairs changed from 14 to 15; data: tokens changed"),
        ({"pairs": small_pairs(14, seed=3)}, "data: tokens changed"),
        ({"model": small_model(rope_theta=5e5)}, "model: configuration changed"),
        ({"pairs_per_step": 2}, "order: pairs per step changed from 4 to 2"),
        ({"seed": 1}, "order: seed changed from 42 to 1"),
    ],
)
def test_another_model_or_other_data_is_refused(copy, change, message):
    run = small_trainer(copy, **change)
    with pytest.raises(CheckpointError, match="belongs to another run: .*" + message):
        run.train(resume_from_checkpoint="last")


def test_frozen_weights_are_part_of_the_fingerprint(tmp_path):
    def trainer(change):
        model = small_model()
        model.model.embed_tokens.weight.requires_grad_(False)
        with torch.no_grad():
            model.model.embed_tokens.weight[3, 3] += change
        return small_trainer(tmp_path, model=model, max_steps=2)

    trainer(0.0).train()
    trainer(0.0).train(resume_from_checkpoint="last")
    with pytest.raises(CheckpointError, match="model: frozen weights changed"):
        trainer(0.5).train(resume_from_checkpoint="last")


@pytest.mark.parametrize(
    "limit, best, left", [(1, None, [8]), (2, None, [6, 8]), (2, 2, [2, 8]), (None, None, [2, 4, 6, 8])]
)
def test_rotation_counts_complete_checkpoints_only(copy, limit, best, left):
    checkpoints.rotate(copy, limit, best and str(copy / f"checkpoint-{best}"))
    assert [checkpoint.step for checkpoint in complete_checkpoints(copy)] == left


def test_rotation_never_deletes_the_only_complete_one(copy):
    for step in (4, 6, 8):
        damage_no_marker(copy / f"checkpoint-{step}")
    os.utime(copy / "checkpoint-2", (0, 0))
    checkpoints.rotate(copy, 1)
    assert [checkpoint.step for checkpoint in complete_checkpoints(copy)] == [2]


@pytest.mark.parametrize("limit, left", [(1, [4]), (None, [2, 4])])
def test_a_run_that_goes_on_clears_up_after_a_kill(copy, limit, left):
    """Before its first step, and from an older checkpoint than the newest. What was saved later and what is of another
    run is set aside, and another program's folders are not touched."""
    for name in (checkpoints.STAGING, ".removing-checkpoint-1", "checkpoint-1", "checkpoint-x"):
        shutil.copytree(copy / "checkpoint-2", copy / name)
    damage_no_marker(copy / "checkpoint-1")
    of_another_run = dict(read_marker(copy / "checkpoint-2"), step=3)
    of_another_run["fingerprint"]["order"]["seed"] = 7
    shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-3")
    (copy / "checkpoint-3" / MARKER).write_text(sealed(of_another_run))
    (copy / ".writing-failed-step-3.json").touch()
    found = []
    look = At(4, lambda: found.extend([complete_checkpoints(copy), list(copy.glob(".*"))]))
    run = small_trainer(copy, save_total_limit=limit, max_steps=5, save_strategy="no", callbacks=[look])
    run.train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert [checkpoint.step for checkpoint in found[0]] == left and not found[1]
    assert (copy / "checkpoint-1").is_dir() and (copy / "checkpoint-x").is_dir()
    aside = sorted(path.name for path in (copy / "superseded" / "1").iterdir())
    assert aside == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_saves_and_the_resumed_run_is_the_same(finished, tmp_path, step):
    """Step 3 (the fourth) ends an epoch: its evaluation waits for the resume."""
    previous = signal.getsignal(signal.SIGTERM)
    run = small_trainer(tmp_path, callbacks=[At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    run.train()
    assert run.checkpointer.stopped and run.state.global_step == step + 1
    assert complete_checkpoints(tmp_path)[-1].step == step + 1
    assert signal.getsignal(signal.SIGTERM) == previous
    run = small_trainer(tmp_path)
    run.train(resume_from_checkpoint="last")
    assert not run.checkpointer.stopped
    run.save_model()
    expected, found = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(tmp_path) == metrics(finished)


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_complete_checkpoint_and_says_so(tiny_disk):
    run = small_trainer(tiny_disk, save_total_limit=None, save_steps=1)
    with pytest.raises(CheckpointError) as caught:
        run.train()
    left = complete_checkpoints(tiny_disk)
    assert left and not (tiny_disk / checkpoints.STAGING).exists()
    message = str(caught.value)
    assert f"checkpoint-{left[-1].step + 1} could not be saved" in message
    assert "no space left on the device" in message
    assert f"The last complete checkpoint is {left[-1].path}: go on with --resume_from_checkpoint last" in message
    assert resolve(tiny_disk, "last") == left[-1].path


def test_unreadable_data_in_mid_run_names_the_record_and_the_last_checkpoint(tmp_path, caplog):
    class Pairs(list):
        broken = False

        def __getitem__(self, index):
            if self.broken and index == 9:
                raise OSError(5, "Input/output error")
            return super().__getitem__(index)

    pairs = Pairs(small_pairs(14))
    run = small_trainer(tmp_path, pairs=pairs, callbacks=[At(2, lambda: setattr(Pairs, "broken", True))])
    with pytest.raises(Exception, match="record 9.*Input/output error"):
        run.train()
    assert f"The last complete checkpoint is {complete_checkpoints(tmp_path)[-1].path}" in caplog.text
    assert "training stopped after step" in caplog.text


def test_a_kill_between_rename_and_marker_is_an_incomplete_checkpoint(copy):
    assert problem_of(copy / "checkpoint-8") == ""
    os.replace(copy / "checkpoint-8" / MARKER, copy / "checkpoint-8" / f".{MARKER}.tmp")
    assert "cut off" in problem_of(copy / "checkpoint-8")


def lora_model():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))


VARIANTS = {
    "adamw": {},
    "in backward, clipped by the previous norm": {"optim_in_backward": "adamw", "max_grad_norm": 0.01},
    "in backward, 8-bit, bfloat16": {"optim_in_backward": "adamw_8bit", "weight_precision": "bf16_stochastic"},
    "fused AdamW, bfloat16": {"weight_precision": "bf16_stochastic"},
    "lora": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_optimizer_resumes_exactly(tmp_path, name):
    def run(folder, callbacks=None):
        model = lora_model() if name == "lora" else small_model()
        model = model.to(torch.bfloat16) if "bfloat16" in name else model
        options = {"tokens_per_micro_batch": 10**6, "save_steps": 3, **VARIANTS[name]}
        trainer = small_trainer(folder, model=model, callbacks=callbacks, **options)
        trainer.train(resume_from_checkpoint="auto")
        return trainer

    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "stopped", [At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert stopped.checkpointer.stopped
    resumed = run(tmp_path / "stopped")
    expected, found = dict(whole.model.named_parameters()), dict(resumed.model.named_parameters())
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    states = [torch.load(f / "checkpoint-8" / "optimizer.pt", weights_only=True) for f in tmp_path.iterdir()]
    assert str(states[0]) == str(states[1])


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path):
    small_trainer(tmp_path, save_only_model=True, max_steps=2).train()
    with pytest.raises(CheckpointError, match="checkpoint-2 holds no optimizer: it was saved with save_only_model"):
        small_trainer(tmp_path).train(resume_from_checkpoint="last")

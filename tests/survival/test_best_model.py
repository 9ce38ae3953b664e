"""load_best_model_at_end of a run that is stopped, moved or damaged: the best is that of the run left alone."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_trainer
from test_checkpoints import At

from amopo_fast.errors import CheckpointError
from amopo_fast.survival.checkpoints import complete_checkpoints

# The loss of unseen noise rises from evaluation to evaluation, at steps 2, 4, 6 and 8, which ends an epoch and the run.
OPTIONS = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
           "metric_for_best_model": "eval_loss", "learning_rate": 3e-3}  # fmt: skip
LAST, FIRST = {"greater_is_better": True}, {"greater_is_better": False}  # evaluation that is the best
SHORT = {"max_steps": 7}  # ends inside an epoch, without an evaluation


def trained(folder, stopped_at=None, **options):
    """A run that SIGTERM stops after a step, or that goes on to its end."""
    callbacks = [At(stopped_at - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))] if stopped_at else None
    run = small_trainer(folder, callbacks=callbacks, **{**OPTIONS, **options})
    run.train(resume_from_checkpoint="auto")
    assert run.checkpointer.stopped == bool(stopped_at)
    return run


def has_weights_of(run, folder):
    saved, own = load_file(Path(folder) / "model.safetensors"), dict(run.model.named_parameters())
    return all(torch.equal(own[name], tensor) for name, tensor in saved.items())


def ends_with_the_best(tmp_path, stopped_at, best, **options):
    """A run with save_total_limit 1 that is stopped after one step and goes on. The newest checkpoint and the best one
    stay, and no other, though the best may be known after the last save alone."""
    stopped = trained(tmp_path, stopped_at, **options)
    newest = complete_checkpoints(tmp_path)[-1]
    assert newest.step == stopped_at and has_weights_of(stopped, newest.path)
    run = trained(tmp_path, **options)
    assert run.state.best_global_step == best and has_weights_of(run, tmp_path / f"checkpoint-{best}")
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == sorted({best, run.state.max_steps})


@pytest.mark.parametrize(
    "stopped_at, best, options",
    [
        pytest.param(2, 2, FIRST, id="the best is evaluated after the resume"),
        pytest.param(8, 8, LAST, id="and so at the end of the run"),
        pytest.param(7, 2, FIRST | SHORT, id="at the end of a run inside an epoch"),
    ],
)
def test_a_stopped_run_ends_with_the_best_of_the_run_left_alone(tmp_path, stopped_at, best, options):
    ends_with_the_best(tmp_path, stopped_at, best, save_total_limit=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("greater_is_better", [True, False])
@pytest.mark.parametrize("learning_rate", [3e-3, 1e-2])
@pytest.mark.parametrize("max_steps", [7, 8])
def test_wherever_it_is_stopped(tmp_path, max_steps, learning_rate, greater_is_better):
    options = {"max_steps": max_steps, "learning_rate": learning_rate, "greater_is_better": greater_is_better}
    best = trained(tmp_path / "alone", **options).state.best_global_step
    for stopped_at in range(1, max_steps + 1):
        ends_with_the_best(tmp_path / f"{stopped_at}", stopped_at, best, save_total_limit=1, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 7 steps whose best checkpoint is the first, of step 2, in a folder that is not where it was."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = trained(folder, save_total_limit=1, **FIRST, **SHORT)
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder)] == [2, 7]
    assert has_weights_of(run, folder / "checkpoint-2")
    return folder.rename(folder.with_name("moved"))


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def test_a_run_that_was_moved_takes_the_best_checkpoint_along(copy):
    run = trained(copy, **FIRST, **SHORT)
    assert run.state.best_model_checkpoint == str(copy / "checkpoint-2") and has_weights_of(run, copy / "checkpoint-2")


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_best_checkpoint_that_is_not_whole_is_said_when_a_run_goes_on(copy, caplog, how):
    damage(copy / "checkpoint-2") if how == "damaged" else shutil.rmtree(copy / "checkpoint-2")
    run = trained(copy, **FIRST)
    reason = "model.safetensors was changed since" if how == "damaged" else "it is not there any more"
    assert f"the best checkpoint, {copy / 'checkpoint-2'}, cannot be used: {reason}" in caplog.text
    assert run.state.best_global_step == 8 and has_weights_of(run, copy / "checkpoint-8")


def test_one_that_is_damaged_at_the_end_is_not_loaded(tmp_path):
    run = small_trainer(tmp_path, callbacks=[At(3, lambda: damage(tmp_path / "checkpoint-2"))], max_steps=4,
                        **OPTIONS, **FIRST)  # fmt: skip
    with pytest.raises(CheckpointError, match="checkpoint-2, the best checkpoint, cannot be loaded: model.safetensors "
                       f"was changed .*The last complete checkpoint is {tmp_path}/checkpoint-4: go on"):  # fmt: skip
        run.train()
    run = trained(tmp_path, max_steps=4, **FIRST)
    assert has_weights_of(run, tmp_path / "checkpoint-4")


def test_another_metric_than_the_one_that_chose_begins_anew(copy, caplog):
    run = trained(copy, greater_is_better=False, metric_for_best_model="eval_margin/mean")
    assert "step 2 was the best by another metric than eval_margin/mean" in caplog.text
    assert run.state.best_global_step == 8

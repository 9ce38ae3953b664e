"""A disk that fails anywhere in a save ends the run with the reason and harms no checkpoint; the resumed run is the one
that was left alone. What no checkpoint needs ends no run."""

import errno
import os
import resource

import pytest
import torch
import transformers.modeling_utils
from kill_runs import result, same
from small_run import small_trainer
from transformers import TrainerCallback

from amopo_fast.errors import CheckpointError
from amopo_fast.survival import durable
from amopo_fast.survival.checkpoints import STAGING, complete_checkpoints
from amopo_fast.survival.manifest import damage_of

pytestmark = pytest.mark.slow

FULL, QUOTA, BROKEN, READ_ONLY, DENIED = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES
SAVE_FILE = (transformers.modeling_utils, "safe_save_file")
STOPS = {  # where: (module, function, what its arguments speak of, error)
    "weights, full": (*SAVE_FILE, "model.safetensors", FULL),
    "weights, broken": (*SAVE_FILE, "model.safetensors", BROKEN),
    "optimizer, full": (torch, "save", "optimizer.pt", FULL),
    "optimizer, quota": (torch, "save", "optimizer.pt", QUOTA),
    "scheduler, broken": (torch, "save", "scheduler.pt", BROKEN),
    "random state, full": (torch, "save", "rng_state.pth", FULL),
    "state of ours, read-only": (torch, "save", "amopo_state_0.pt", READ_ONLY),
    "state of Trainer, full": (transformers.TrainerState, "save_to_json", "trainer_state.json", FULL),
    "flush of the weights, broken": (durable, "flush", f"{STAGING}/checkpoint-4/model.safetensors", BROKEN),
    "flush of the optimizer, full": (durable, "flush", f"{STAGING}/checkpoint-4/optimizer.pt", FULL),
    "flush of the folder, broken": (durable, "flush", f"{STAGING}/checkpoint-4'", BROKEN),
    "rename of the folder, denied": (os, "replace", f"{STAGING}/checkpoint-4'", DENIED),
    "rename of the folder, broken": (os, "replace", f"{STAGING}/checkpoint-4'", BROKEN),
    "marker, full": (durable, "write_text", "complete.json", FULL),
    "rename of the marker, broken": (os, "replace", ".writing-complete.json", BROKEN),
}
GOES_ON = {
    "metrics, full": (durable, "append", "metrics.jsonl", FULL),
    "deletion of an old checkpoint, denied": (os, "replace", ".removing-checkpoint-2", DENIED),
    "deletion of an old checkpoint, broken": (os, "replace", ".removing-checkpoint-2", BROKEN),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run = small_trainer(folder)
    run.train()
    run.save_final()
    return result(folder)


class Faulty(TrainerCallback):
    """From the beginning of step 4 on, the function fails where its arguments speak of `what`."""

    def __init__(self, patch, module, function, what, error):
        self.armed, self.failed = False, 0
        real = getattr(module, function)

        def failing(*args, **options):
            paths = [os.fspath(each) for each in args if isinstance(each, (str, os.PathLike))]
            if self.armed and what in repr(paths):
                self.failed += 1
                raise OSError(error, os.strerror(error), paths[0])
            return real(*args, **options)

        patch.setattr(module, function, failing)

    def on_step_begin(self, args, state, control, **kwargs):
        self.armed = state.global_step >= 3


def goes_on(folder, alone):
    run = small_trainer(folder)
    run.train(resume_from_checkpoint="last")
    run.save_final()
    found = result(folder)
    assert [key for key, value in alone.items() if not same(value, found[key])] == []


@pytest.mark.parametrize("name", STOPS)
def test_a_fault_in_a_save_stops_the_run_and_costs_nothing_else(tmp_path, alone, name):
    with pytest.MonkeyPatch.context() as patch:
        fault = Faulty(patch, *STOPS[name])
        run = small_trainer(tmp_path, callbacks=[fault])
        with pytest.raises(CheckpointError) as caught:
            run.train()
    assert fault.failed == 1
    message, error = str(caught.value), STOPS[name][-1]
    assert message.startswith(f"checkpoint-4 could not be saved in {tmp_path}: ")
    assert ("no space left on the device" if error in (FULL, QUOTA) else os.strerror(error)) in message
    assert f"The last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert [each.step for each in complete_checkpoints(tmp_path)] == [2]
    assert damage_of(tmp_path / "checkpoint-2") == "" and not (tmp_path / STAGING).exists()
    goes_on(tmp_path, alone)


@pytest.mark.parametrize("name", GOES_ON)
def test_a_fault_in_what_no_resume_needs_ends_no_run(tmp_path, alone, caplog, name):
    with pytest.MonkeyPatch.context() as patch:
        fault = Faulty(patch, *GOES_ON[name])
        run = small_trainer(tmp_path, callbacks=[fault])
        run.train()
    assert fault.failed and os.strerror(GOES_ON[name][-1]) in caplog.text
    run.save_final()
    found = result(tmp_path)
    assert same(found["weights"], alone["weights"]) and found["logged"] == alone["logged"]
    assert all(damage_of(each.path) == "" for each in complete_checkpoints(tmp_path))


@pytest.mark.parametrize("name", ["weights, full", "weights, broken"])
def test_a_fault_in_the_final_save_leaves_no_half_model(tmp_path, alone, name):
    run = small_trainer(tmp_path)
    run.train()
    with pytest.MonkeyPatch.context() as patch:
        fault = Faulty(patch, *STOPS[name])
        fault.armed = True
        with pytest.raises(CheckpointError, match="the trained model could not be saved .* The last complete"):
            run.save_final()
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()
    assert not (tmp_path / STAGING).exists()
    goes_on(tmp_path, alone)


class Limit(TrainerCallback):
    """From step 4 on no file may grow as large as the `number`-th largest of checkpoint-2."""

    def __init__(self, folder, number):
        self.folder, self.number = folder, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            sizes = sorted(path.stat().st_size for path in (self.folder / "checkpoint-2").iterdir())
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-self.number] - 1, hard))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_files_that_may_not_grow_beyond_a_limit(tmp_path, alone, number):
    """The kernel's own refusal in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = small_trainer(tmp_path, callbacks=[Limit(tmp_path, number)])
    try:
        with pytest.raises(CheckpointError, match="checkpoint-4 could not be saved"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.step for each in complete_checkpoints(tmp_path)] == [2] and not (tmp_path / STAGING).exists()
    goes_on(tmp_path, alone)

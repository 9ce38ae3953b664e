"""metrics.jsonl is whole after a resume and a full disk; a checkpoint's own log does not grow with the run."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import small_trainer
from test_checkpoints import At, metrics, tiny_disk  # noqa: F401

from amopo_fast.cli import train as command
from amopo_fast.survival.checkpoints import complete_checkpoints
from amopo_fast.training import metrics_file

OPTIONS = {"logging_steps": 1, "num_train_epochs": 4, "save_total_limit": None}


@contextmanager
def short():
    """A checkpoint keeps five lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "KEPT", 5)
        yield


def history(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with short():
        small_trainer(folder, **OPTIONS).train()
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, to go on from."""
    with short():
        yield Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_checkpoint_holds_the_first_and_the_last_lines(whole):
    assert len(metrics(whole)) == 21  # 16 steps, 4 evaluations, the end
    assert [line["step"] for line in history(whole, 2)] == [1, 2]
    assert [line["step"] for line in history(whole, 16)] == [1, 14, 15, 16, 16]


@pytest.mark.parametrize("step", [2, 4, 6, 14])
def test_a_resumed_run_has_every_line_once(finished, step):
    """Step 4 ends an epoch with an evaluation; at 6 and later, lines are in the file alone."""
    expected = metrics(finished)
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    small_trainer(finished, **OPTIONS).train(resume_from_checkpoint=str(finished / f"checkpoint-{step}"))
    assert metrics(finished) == expected


def test_lines_that_no_checkpoint_and_no_file_has_are_said_to_be_lost(finished, caplog):
    expected = metrics(finished)
    (finished / "metrics.jsonl").unlink()
    small_trainer(finished, **OPTIONS).train(resume_from_checkpoint=str(finished / "checkpoint-14"))
    assert "metrics.jsonl lacks lines of the run before step 12: they are lost" in caplog.text
    assert metrics(finished) == [expected[0], *(line for line in expected if line["step"] >= 12)]


def test_a_full_disk_ends_no_run_and_costs_no_line(tiny_disk, caplog):  # noqa: F811
    filler = tiny_disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                pass

    calls = [At(2, fill), At(6, filler.unlink)]
    run = small_trainer(tiny_disk, save_strategy="no", eval_strategy="no", callbacks=calls, logging_steps=1)
    run.train()
    assert [line["step"] for line in metrics(tiny_disk)] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert caplog.text.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert not complete_checkpoints(tiny_disk)


def test_a_full_disk_costs_the_plot_and_not_the_run(tiny_disk, capsys):  # noqa: F811
    lines = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    (tiny_disk / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"weight": torch.zeros(3)}, tiny_disk / "model.safetensors")
    with pytest.raises(OSError, match="No space left"), (tiny_disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(512))
    command._report(None, tiny_disk)
    out, err = capsys.readouterr()
    assert "No space left on device; the model is saved; make room, then `amopo-fast plot" in err
    assert out.startswith(f"model: {tiny_disk} (") and "plot: none" in out
    assert not list(tiny_disk.glob("*.png"))

"""Signals in every part of a run: each ends it with what was trained saved, and with a message."""

import os
import signal
import threading

import pytest
import torch
from demo_folder import demo_folder
from safetensors.torch import load_file
from small_run import small_trainer
from test_checkpoints import At, metrics

from amopo_fast.cli import main
from amopo_fast.cli import train as command
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.survival import signals
from amopo_fast.survival.checkpoints import STAGING, complete_checkpoints
from amopo_fast.survival.lock import FILE

ROWS = {"per_device_eval_batch_size": 1}  # four


def send(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A suite in the background of a shell, or under nohup, starts with signals that it ignores, as training would."""
    before = {number: signal.signal(number, handler) for number, handler in
              ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL))}  # fmt: skip
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run = small_trainer(folder, **ROWS)
    run.train()
    run.save_final()
    return folder


def goes_on_to_the_same(finished, folder):
    run = small_trainer(folder, **ROWS)
    run.train(resume_from_checkpoint="last")
    run.save_final()
    expected, found = (load_file(each / "model.safetensors") for each in (finished, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert metrics(folder) == metrics(finished)


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGHUP"])
def test_each_of_them_saves_between_two_steps(tmp_path, name):
    handlers = {each: signal.getsignal(getattr(signal, each)) for each in signals.NAMES}
    run = small_trainer(tmp_path, callbacks=[At(2, send(name))])
    run.train()
    assert run.checkpointer.stopped and run.termination.requested == name
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2, 3]
    assert handlers == {each: signal.getsignal(getattr(signal, each)) for each in signals.NAMES}


def test_a_second_sigint_stops_at_once_and_harms_nothing(tmp_path, monkeypatch):
    def twice():
        send("SIGINT")()
        send("SIGINT")()  # within a second: torchrun's copy of the same one
        monkeypatch.setattr(signals, "SAME", -1.0)
        send("SIGTERM")()
        send("SIGINT")()
        raise AssertionError("it went on")

    run = small_trainer(tmp_path, callbacks=[At(3, twice)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2] and not (tmp_path / FILE).exists()


def test_what_was_ignored_stays_ignored(tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        run = small_trainer(tmp_path, max_steps=2, callbacks=[At(1, send("SIGHUP"))])
        run.train()
        assert not run.checkpointer.stopped and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def in_row(run, number):
    """SIGTERM before the `number`-th row of an evaluation, counted over all of them."""
    original, rows = run.stop_between_rows, []

    def watched():
        rows.append(run.state.global_step)
        if len(rows) == number:
            send("SIGTERM")()
        original()

    run.stop_between_rows = watched
    return rows


@pytest.mark.parametrize("row", [2, 6])
def test_in_an_evaluation_it_stops_between_two_rows(finished, tmp_path, row):
    """Four rows at the end of each epoch, at steps 4 and 8. The resumed run evaluates anew."""
    run = small_trainer(tmp_path, **ROWS)
    rows = in_row(run, row)
    run.train()
    step = 4 if row < 5 else 8
    assert run.checkpointer.stopped and run.state.global_step == step and len(rows) == row
    assert complete_checkpoints(tmp_path)[-1].step == step
    goes_on_to_the_same(finished, tmp_path)


def test_in_the_evaluation_of_a_resume_the_checkpoint_stays_as_it_is(finished, tmp_path):
    run = small_trainer(tmp_path, callbacks=[At(3, send("SIGTERM"))], **ROWS)
    run.train()
    saved = (tmp_path / "checkpoint-4" / "complete.json").read_bytes()
    run = small_trainer(tmp_path, **ROWS)
    in_row(run, 1)
    run.train(resume_from_checkpoint="last")
    assert run.checkpointer.stopped and run.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "complete.json").read_bytes() == saved
    goes_on_to_the_same(finished, tmp_path)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    demo_folder(folder)
    return ["train", "--model_name_or_path", str(folder), "--train_data", str(HELDOUT_FILE),
            "--dimensions", *DIMENSIONS, "--use_cpu", "true", "--report_to", "none", "--max_steps", "2",
            "--pairs_per_step", "2", "--save_steps", "1", "--output_dir"]  # fmt: skip


def test_while_the_data_is_read(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "as_begun", lambda *args: send("SIGTERM")())
    assert main([*arguments, str(tmp_path / "run")]) == command.STOPPED
    assert capsys.readouterr().err == "stopped by SIGTERM before training began; what was saved before is as it was\n"
    assert not (tmp_path / "run" / FILE).exists()


def test_while_the_final_model_is_saved(arguments, tmp_path, monkeypatch, capsys):
    from amopo_fast.training.trainer import AMoPOTrainer

    folder = tmp_path / "run"
    original = AMoPOTrainer._save

    def save(self, output_dir=None, state_dict=None):
        original(self, output_dir, state_dict)
        if STAGING in str(output_dir) and "checkpoint-" not in str(output_dir):
            send("SIGUSR1")()

    monkeypatch.setattr(AMoPOTrainer, "_save", save)
    assert main([*arguments, str(folder)]) == command.STOPPED
    error = capsys.readouterr().err
    assert "stopped by SIGUSR1 when training was done and the model was not yet saved. The last complete" in error
    assert f"checkpoint is {folder / 'checkpoint-2'}: go on with" in error
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    monkeypatch.setattr(AMoPOTrainer, "_save", original)
    assert main([*arguments, str(folder), "--resume_from_checkpoint", "last"]) == 0
    assert (folder / "model.safetensors").exists() and not (folder / STAGING).exists()


def test_ctrl_c_twice_ends_the_command_with_130(arguments, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "as_begun", fail)
    assert main([*arguments, str(tmp_path)]) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err


def test_in_another_thread_nothing_is_installed(tmp_path):
    run, before = small_trainer(tmp_path, max_steps=1), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before and complete_checkpoints(tmp_path)[-1].step == 1

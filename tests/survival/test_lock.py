"""One run at a time in a folder: who holds it is named, who is gone is not waited for."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import small_trainer
from test_checkpoints import At

from amopo_fast.errors import CheckpointError
from amopo_fast.survival import lock
from amopo_fast.survival.checkpoints import complete_checkpoints
from amopo_fast.survival.lock import FILE, OutputLock, require_lock

HOLD = """
import sys
from amopo_fast.survival.lock import OutputLock
print("ready", flush=True)
sys.stdin.readline()
try:
    with OutputLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except Exception as error:
    print(error, flush=True)
"""


def hold(folder):
    """A process that waits for a line, takes the lock, says so or why not, and holds it until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, bufsize=1)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_another_process_is_refused_by_name_until_it_ends(tmp_path):
    process = hold(tmp_path)
    process.stdin.write("\n")
    assert process.stdout.readline() == "held\n"
    started = json.loads((tmp_path / FILE).read_text())["started"]
    message = rf"in use by another run \(process {process.pid} on .+, since {started}\).*delete .*{FILE}"
    with pytest.raises(CheckpointError, match=message), OutputLock(tmp_path):
        pass
    run = small_trainer(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "metrics.jsonl").exists()
    process.kill()
    process.communicate()
    (tmp_path / f"{FILE}.host.7").touch()  # of one that was killed as it took the lock over
    with OutputLock(tmp_path):  # killed: its file is there, and stale
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob(f"{FILE}*"))


@pytest.mark.parametrize("stale", [False, True])
def test_of_runs_that_start_at_once_one_has_the_folder(tmp_path, stale):
    if stale:
        (tmp_path / FILE).write_text(json.dumps({**mine(tmp_path), "pid": 2**22 + 1}))
    processes = [hold(tmp_path) for _ in range(4)]
    for process in processes:
        process.stdin.write("\n")
    found = [process.stdout.readline() for process in processes]
    assert sorted(text == "held\n" for text in found) == [False, False, False, True], found
    assert sum("in use by another run" in text for text in found) == 3
    for process in processes:
        process.communicate()


def mine(folder):
    with OutputLock(folder):
        return json.loads((folder / FILE).read_text())


@pytest.mark.parametrize(
    "change", [{"pid": 2**22 + 1}, {"birth": "another boot 77"}, {"pid": "17"}, {"pid": None, "host": ""}]
)
def test_an_owner_that_is_gone_is_not_waited_for(tmp_path, caplog, monkeypatch, change):
    """The number of its process may be another's by now."""
    monkeypatch.setattr(lock, "WATCH", 0.2)
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    (tmp_path / FILE).write_text(json.dumps({**mine(tmp_path), **change}))
    with OutputLock(tmp_path):
        assert "taking its lock over" in caplog.text


@pytest.mark.parametrize("alive", [False, True])
def test_an_owner_on_another_host_is_watched(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "WATCH", 1.0)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    other = OutputLock(tmp_path)
    with other:
        del lock._held[other.path]  # as if another process had it
        (tmp_path / FILE).write_text(json.dumps({**other._mine, "host": "elsewhere"}))
        if not alive:
            other._ended.set()
            time.sleep(0.3)
        try:
            with OutputLock(tmp_path):
                assert not alive
        except CheckpointError as error:
            assert alive and "on elsewhere" in str(error)
        lock._held[other.path] = other


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_lock_that_cannot_be_read_is_taken_over_when_nobody_touches_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "WATCH", 0.2)
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    (tmp_path / FILE).write_text(content)
    with OutputLock(tmp_path):
        require_lock(tmp_path)


def test_a_lock_that_is_being_written_names_its_owner(tmp_path, monkeypatch):
    """Between its making and its writing it is empty, and nobody's process."""
    owner = mine(tmp_path)
    (tmp_path / FILE).touch()
    monkeypatch.setattr(lock, "WATCH", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / FILE).write_text(json.dumps(owner)))
    with pytest.raises(CheckpointError, match=f"process {owner['pid']} on"), OutputLock(tmp_path):
        pass


def test_a_run_holds_it_from_beginning_to_end_and_gives_it_up_after_an_error(tmp_path):
    seen = []
    run = small_trainer(tmp_path, max_steps=2, callbacks=[At(1, lambda: seen.append((tmp_path / FILE).exists()))])
    with OutputLock(tmp_path):
        run.train()
        assert (tmp_path / FILE).exists()  # entered twice, left once
    assert seen == [True] and not (tmp_path / FILE).exists()
    with pytest.raises(ZeroDivisionError):
        small_trainer(tmp_path, callbacks=[At(3, lambda: 1 / 0)]).train()
    with pytest.raises(CheckpointError, match="belongs to another run"):
        small_trainer(tmp_path, seed=3).train(resume_from_checkpoint="last")
    assert not (tmp_path / FILE).exists()


def test_a_run_whose_lock_was_taken_publishes_nothing(tmp_path):
    def steal():
        (tmp_path / FILE).write_text(json.dumps({"host": "elsewhere", "pid": 7}))

    with pytest.raises(CheckpointError, match="this run does not own .* any more .7 on elsewhere"):
        small_trainer(tmp_path, callbacks=[At(3, steal)]).train()
    assert [each.step for each in complete_checkpoints(tmp_path)] == [2] and (tmp_path / FILE).exists()


def test_a_full_disk_names_the_file_and_leaves_no_lock(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def __enter__(self):
            (tmp_path / FILE).touch()
            return self

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Full() if path.name == FILE
                        else opened(path, *args, **options))  # fmt: skip
    with pytest.raises(OSError, match="No space left on device: .*_lock.json"), OutputLock(tmp_path):
        pass
    assert not (tmp_path / FILE).exists()

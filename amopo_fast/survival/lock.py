"""One run at a time in an output_dir: a lock file that names its owner, and is taken over once the owner is gone.

An owner on this host is alive if its process is. One on another host, or in another container, cannot be asked: it
touches the file every BEAT seconds, and who finds it watches for WATCH seconds, by its own clock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from amopo_fast.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE = "_lock.json"  # uploads to the Hub leave out names that begin with _
BEAT = 10.0
WATCH = 35.0
SETTLE = 0.3  # seconds until a lock names its owner: one just made, or taken over by two runs at once (the later wins)

_held: dict[Path, OutputLock] = {}


class OutputLock:
    """Context manager: inside, this process owns `output_dir`. Entered again by the same process it does nothing.

    Raises:
        CheckpointError: another run owns it; names host, process and start. OSError: the folder cannot be written.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(os.path.realpath(output_dir)) / FILE
        self._owns = False
        self._mine: dict[str, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> OutputLock:
        if self.path in _held:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                      **_birth(os.getpid())}  # fmt: skip
        while not self._take():
            pass
        self._owns, _held[self.path] = True, self
        self._ended.clear()
        threading.Thread(target=self._beat, name="output_dir lock", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        if self._owns:
            self._ended.set()
            self._owns = False
            del _held[self.path]
            if _read(self.path) == self._mine:
                for partial in self.path.parent.glob(f"{FILE}.*"):  # of runs that were killed as they took it over
                    partial.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        text = json.dumps(self._mine)
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
            return True
        except FileExistsError:
            pass
        except OSError as error:  # a full disk leaves an empty file, which the next run would watch
            self.path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        owner = _read(self.path)
        if owner == {}:  # it may have been made just now, and is about to be written
            time.sleep(SETTLE)
            owner = _read(self.path)
        if owner is None:  # it was given up just now
            return False
        if self._alive(owner):
            who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('started', '?')}"
            raise CheckpointError(
                f"{self.path.parent} is in use by another run ({who}): two runs in one folder would destroy each "
                f"other's checkpoints. Wait for it, or give another output_dir; if it is sure to be gone, delete "
                f"{self.path}"
            )
        logger.warning("the run that was in %s (%s on %s) is gone: taking its lock over", self.path.parent,
                       owner.get("pid", "?"), owner.get("host", "?"))  # fmt: skip
        partial = self.path.with_name(f"{FILE}.{self._mine['host']}.{self._mine['pid']}")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)
        time.sleep(SETTLE)
        return _read(self.path) == self._mine

    def _alive(self, owner: dict[str, Any]) -> bool:
        here = ("host", "namespace")
        if owner.get("pid") and all(owner.get(key) == self._mine.get(key) for key in here):
            birth = _birth(owner["pid"])
            return bool(birth) and birth == {key: owner.get(key) for key in birth}
        first, until = _beat_of(self.path), time.monotonic() + WATCH
        logger.warning("%s is locked by %s: watching for %.0f s whether it is alive", self.path.parent,
                       owner.get("host", "another host"), WATCH)  # fmt: skip
        while time.monotonic() < until:
            time.sleep(min(0.5, WATCH / 10))
            if _beat_of(self.path) != first:
                return True
        return False

    def _beat(self) -> None:
        pid = os.getpid()
        while not self._ended.wait(BEAT) and os.getpid() == pid:
            try:
                os.utime(self.path)
            except OSError:  # `require` tells, before something is lost
                pass


def require_lock(output_dir: str | Path) -> None:
    """Before a checkpoint is published: raises CheckpointError where another run has taken this process's lock."""
    path = Path(os.path.realpath(output_dir)) / FILE
    lock = _held.get(path)
    if lock is not None and (owner := _read(path)) != lock._mine:
        who = f"{owner.get('pid', '?')} on {owner.get('host', '?')}" if owner else "nobody: its file was deleted"
        raise CheckpointError(f"this run does not own {path.parent} any more ({who})")


def _read(path: Path) -> dict[str, Any] | None:
    """The owner that a lock names, {} where it cannot be read, None where there is no lock."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _beat_of(path: Path) -> int:
    """When the lock was last touched; opened for it, since network file systems are up to date on opening alone."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _birth(pid: int) -> dict[str, str]:
    """What tells a process from a later one of the same number: {} if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return {}
    except (OSError, OverflowError, TypeError):  # it is another user's
        pass
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if state == "Z":
            return {}
        return {"birth": f"{boot} {rest[18]}", "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"birth": "unknown"}  # no /proc here

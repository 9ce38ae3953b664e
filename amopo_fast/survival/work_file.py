"""A file of lines that a long command appends to and goes on with after a kill.

The first line holds the options that the work was begun with; other ones are refused, since lines of two kinds of work
would be mixed. One process has the file at a time.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from amopo_fast.errors import OptionError, shown


class WorkFile:
    """Context manager; inside, `lines` are the objects that are done, in their order.

    A line that a kill cut short is dropped.

    Args:
        options: what the lines depend on, ready for JSON.

    Raises:
        OptionError: the file was begun with other options, is in use by another process, or is no such file.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any]):
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        self._options = json.loads(json.dumps(options))

    def __enter__(self) -> WorkFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """At the end, in one write, which a reader sees whole or not at all but for a kill in its middle."""
        added = [json.loads(json.dumps(line)) for line in lines]
        self._write(added)
        self.lines += added

    def keep(self, count: int) -> None:
        """Drop the lines behind the first `count`."""
        if count < len(self.lines):
            self.lines = self.lines[:count]
            self._file.seek(0)
            self._file.truncate(sum(map(len, self._file.read().splitlines(keepends=True)[: count + 1])))

    def remove(self) -> None:
        """Once its content is elsewhere."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"{self.path} is being written by another process: wait for it, or write to another "
                              "place") from None  # fmt: skip

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[:whole].splitlines()]
        except ValueError as error:
            raise OptionError(f"{self.path} cannot be gone on with: {error}; delete it to begin again") from None
        if not all(isinstance(line, dict) for line in lines):
            raise OptionError(f"{self.path} is another kind of file; write to another place")
        self._file.truncate(whole)
        if len(lines) < 2:  # nothing is done yet
            self._file.truncate(0)
            self._write([self._options])
            return
        for name in {**self._options, **lines[0]}:
            before, now = lines[0].get(name), self._options.get(name)
            if before != now:
                raise OptionError(
                    f"{self.path} was begun with another {name} ({shown(before)}, now {shown(now)}): give the same to "
                    "go on, write to another place, or delete that file to begin again", name,
                )  # fmt: skip
        self.lines = lines[1:]

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = data.encode("utf-8", "surrogatepass")
        while content:
            content = content[self._file.write(content) :]

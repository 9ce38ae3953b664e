"""Small text files that a user names: never waited for, and never more in memory than such a file can hold."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

LIMIT = 64 << 20  # bytes; far above any configuration, template or report


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file.

    Raises:
        OSError: it cannot be read, is a named pipe or holds more than LIMIT bytes. UnicodeDecodeError.
    """
    refuse_pipe(path)
    with Path(path).open("rb") as file:
        content = file.read(LIMIT + 1)  # a device has no end
    if len(content) > LIMIT:
        raise OSError(errno.EFBIG, f"it holds more than {LIMIT >> 20} MB, which no such file does", str(path))
    return content.decode("utf-8")


def refuse_pipe(path: str | Path) -> None:
    """Raises OSError for a named pipe: opening it would wait for a writer. Those of a shell, `<(...)`, have one."""
    if stat.S_ISFIFO(Path(path).stat().st_mode) and not str(path).startswith(("/dev/", "/proc/")):
        raise OSError(errno.EINVAL, "it is a named pipe: write its content to a file", str(path))

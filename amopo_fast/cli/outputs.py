"""Where a command writes: a place that cannot be written to is bad usage, said before anything is loaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from amopo_fast.errors import OptionError


def output_folder(path: str | Path, option: str) -> Path:
    """A folder that is there or can be made.

    Raises:
        OptionError: a file is in the way, or its name or rights are; names the option and the path.
    """
    for place in (Path(path), *Path(path).absolute().parents):
        mode = _mode_of(place, option)
        if mode is None:
            continue
        if not stat.S_ISDIR(mode):
            raise OptionError(f"{option}: {place} is a file; name a folder", option)
        if not os.access(place, os.W_OK | os.X_OK):
            raise OptionError(f"{option}: {place} may not be written to; name another folder", option)
        break
    return Path(path)


def output_file(path: str | Path, option: str) -> Path:
    """A file in a folder that exists. Raises as `output_folder`."""
    path = Path(path)
    mode = _mode_of(path, option)
    if mode is not None and stat.S_ISDIR(mode):
        raise OptionError(f"{option}: {path} is a folder; name a file in it", option)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OptionError(f"{option}: {parent} is no folder; name a file in a folder that exists", option)
    if not os.access(path if mode is not None else parent, os.W_OK):
        raise OptionError(f"{option}: {path} may not be written to; name another file", option)
    return path


def _mode_of(path: Path, option: str) -> int | None:
    """What lies at a path, None for nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
        reason = "it is a link to nothing"
    except OSError as error:
        reason = error.strerror
    raise OptionError(f"{option}: {path} cannot be written to ({reason}); name another place", option)

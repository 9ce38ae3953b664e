"""Files and folders that are either whole or not there: flush, rename, flush the parent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PARTIAL, REMOVING = ".writing-", ".removing-"  # what a kill leaves begins with these


def flush(path: Path) -> None:
    """fsync a file, or a folder (which makes the names in it durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and `folder`."""
    for parent, _, files in os.walk(folder):
        for name in files:
            flush(Path(parent) / name)
        flush(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Replace a file's content: a reader sees the old text or the new, also after a power cut."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    flush(path.parent)


def append(path: Path, content: bytes) -> None:
    """All of `content` at the end of a file, or nothing. Without a buffer, which would write what is left of it when it
    is closed.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            os.truncate(path, size)
            raise


def remove_tree(folder: Path) -> None:
    """Delete a folder; killed half-way it is left under a hidden name, never as half a folder under its own."""
    if folder.is_dir():
        hidden = folder.with_name(f"{REMOVING}{folder.name.lstrip('.')}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

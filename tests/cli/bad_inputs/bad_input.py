"""One bad input: what is asked for, what is wrong with it, and what the one who wrote it has to be told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amopo_fast.cli import main
from amopo_fast.errors import CheckpointError, JudgeError, NumbersError

# Errors of the Python API that a program may catch by type; argparse ends a command by SystemExit.
NAMED = (ValueError, OSError, CheckpointError, JudgeError, NumbersError)
# What a library advises and a user must never be told, or what only the author of the package can act on.
NEVER = ("Traceback", "weights_only", "trust_remote_code=True", "open an issue", "object has no attribute",
         "object is not", "KeyError", "IndexError", "AttributeError", "AssertionError")  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """
    Attributes:
        name: for people, unique.
        command: words of a command line in which {work} is a folder of good files and {here} one of this case alone, or
            a function of both that uses the Python API.
        words: patterns that the message has, all of them: the name of the option, record, field or file; the remedy.
        code: the exit code; of a Python call 1.
        damage: makes the bad files in {here}.
    """

    name: str
    command: Sequence[str] | Callable[[Path, Path], Any]
    words: Sequence[str]
    code: int = 2
    damage: Callable[[Path, Path], Any] | None = None


def what_it_says(case: Bad, work: Path, here: Path, capsys) -> tuple[int, str]:
    """(exit code, all that was printed, in one line). Whatever is raised beside named errors goes through."""
    here.mkdir()
    if case.damage is not None:
        case.damage(work, here)
    raised = ""
    if callable(case.command):
        try:
            case.command(work, here)
            code = 0
        except NAMED as error:
            code, raised = 1, str(error)
    else:
        try:
            code = main([word.format(work=work, here=here) for word in case.command])
        except SystemExit as stop:
            code = stop.code
    out, err = capsys.readouterr()
    shutil.rmtree(here)
    return code, re.sub(r"\s+", " ", f"{out} {err} {raised}")  # where a line breaks depends on paths


def what_is_wrong(case: Bad, work: Path, here: Path, capsys) -> str:
    """ "" where the case ends as it has to, else what happened."""
    try:
        code, text = what_it_says(case, work, here, capsys)
    except Exception as error:
        capsys.readouterr()
        shutil.rmtree(here, ignore_errors=True)
        return f"a traceback: {type(error).__name__}: {error}"
    if code != case.code:
        return f"exit code {code}: {text[-600:]}"
    absent = [word for word in case.words if not re.search(word, text)]
    if absent:
        return f"says nothing of {absent}: {text[-900:]}"
    found = [word for word in NEVER if word in text]
    return f"says {found}: {text[-900:]}" if found else ""

"""Checkpoints that are whole or not there, and the one that a run resumes from.

    .saving/checkpoint-N  ->  fsync  ->  .saving/checkpoint-N/complete.json  ->  checkpoint-N

The marker `complete.json` is the last file (manifest.py), and the folder gets its name with it inside: a kill leaves no
half of a checkpoint. A folder without it, or with a file that is missing, damaged or not of that save, is skipped on
resume, with the reason. transformers.Trainer writes the contents.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from amopo_fast.errors import CheckpointError
from amopo_fast.survival import durable
from amopo_fast.survival.fingerprint import differences
from amopo_fast.survival.manifest import MARKER, damage_of, make_manifest, problem_of, read_marker, sealed

logger = logging.getLogger(__name__)

STAGING = ".saving"
SUPERSEDED = "superseded"
CONFIGURATIONS = ("config.json", "adapter_config.json")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-N`; `problem` says why it is not complete, "" if it is. Its files were not read."""

    path: Path
    step: int
    problem: str


def step_of(folder: str | Path) -> int | None:
    """The optimizer step of a folder named checkpoint-N, None for another name."""
    match = _NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def checkpoints_in(output_dir: str | Path) -> list[Checkpoint]:
    """All folders named checkpoint-N, oldest first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [(step, path) for path in output_dir.iterdir() if (step := step_of(path)) is not None]
    return [Checkpoint(path, step, problem_of(path)) for step, path in sorted(found) if path.is_dir()]


def complete_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """Those that were saved whole, oldest first."""
    return [checkpoint for checkpoint in checkpoints_in(output_dir) if not checkpoint.problem]


def resolve(output_dir: str | Path, resume: str | Path | bool | None) -> Path | None:
    """The folder to resume from.

    Args:
        resume: None or False: none. "last" or True: the newest whole checkpoint of `output_dir`, all of whose files are
            read; newer ones that are cut off or damaged are logged with the reason. "auto": the same, or a fresh run if
            there is none. Else a folder.

    Raises:
        CheckpointError: there is no complete checkpoint, or the named folder is none; `output_dir` is one.
    """
    if (Path(output_dir) / MARKER).exists():
        raise CheckpointError(f"output_dir {output_dir} is a checkpoint, whose files a run would replace by its own: "
                              "name another folder")  # fmt: skip
    if resume is None or resume is False or resume == "":
        return None
    word = str(resume).lower()
    if word not in ("true", "last", "auto"):
        problem = damage_of(Path(str(resume))) if Path(str(resume)).is_dir() else "there is no such folder"
        if problem:
            raise CheckpointError(
                f"{resume} cannot be resumed: {problem}. Give another one, or `last`, which takes the newest whole one"
            )
        return Path(str(resume))
    skipped = []
    for checkpoint in reversed(checkpoints_in(output_dir)):
        problem = checkpoint.problem or damage_of(checkpoint.path)
        if not problem:
            for path, reason in skipped:
                logger.warning("skipped %s: %s", path, reason)
            logger.warning("resuming from %s", checkpoint.path)
            return checkpoint.path
        skipped.append((checkpoint.path, problem))
    reasons = "".join(f"; {path.name}: {reason}" for path, reason in skipped)
    if word == "auto":
        logger.warning("%s has no complete checkpoint%s: starting from the beginning", output_dir, reasons)
        return None
    found = "complete checkpoint" if skipped else "checkpoint"
    raise CheckpointError(
        f"{output_dir} has no {found} to resume from{reasons}. Leave resume_from_checkpoint out to start from the "
        "beginning"
    )


def clear_staging(output_dir: Path) -> None:
    """Remove what killed saves, deletions and writes of small files left."""
    for leftover in (output_dir / STAGING, *output_dir.glob(f"{durable.REMOVING}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for partial in output_dir.glob(f"{durable.PARTIAL}*"):
        with contextlib.suppress(OSError):
            partial.unlink()


def publish(staged: Path, final: Path, **marker) -> None:
    """Turn a staged folder into the checkpoint `final`, which is complete once it is there.

    Raises:
        CheckpointError: the staged folder does not hold all of a checkpoint.
    """
    manifest = make_manifest(staged, **marker)
    durable.flush_tree(staged)
    durable.write_text(staged / MARKER, sealed(manifest))
    durable.remove_tree(final)  # this run's own: `supersede` has moved away what lay there when it began
    os.replace(staged, final)
    durable.flush(final.parent)


def publish_model(staged: Path, output_dir: Path) -> None:
    """Move a model's files from `staged` to `output_dir`. Its configuration goes first and comes last: cut off in
    between there is no model, and never one with the weights of another."""
    durable.flush_tree(staged)
    names = sorted((path.name for path in staged.iterdir()), key=lambda name: (name in CONFIGURATIONS, name))
    for name in CONFIGURATIONS:
        (output_dir / name).unlink(missing_ok=True)
    for old in (*output_dir.glob("*.safetensors"), *output_dir.glob("*.safetensors.index.json")):
        if old.name not in names:
            old.unlink()
    durable.flush(output_dir)
    for name in names:
        durable.remove_tree(output_dir / name)
        os.replace(staged / name, output_dir / name)
    durable.flush(output_dir)
    durable.remove_tree(output_dir / STAGING)


def rotate(output_dir: Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, never the newest complete one nor `keep` (the best)."""
    if not limit or limit < 1:
        return
    complete = [checkpoint.path for checkpoint in complete_checkpoints(output_dir)]
    best = Path(keep).name if keep else None
    protected = {path for path in complete if path.name == best} | set(complete[-1:])
    removable = [path for path in complete if path not in protected]
    for path in removable[: max(0, len(complete) - max(limit, len(protected)))]:
        durable.remove_tree(path)


def supersede(output_dir: Path, step: int, fingerprint: dict) -> None:
    """Set checkpoints aside that are not of the run that starts at `step`, which would mix with them and rotate them:
    those beyond `step`, and whole ones of another model, other data or another order (`fingerprint`)."""
    others = [
        checkpoint.path
        for checkpoint in checkpoints_in(output_dir)
        if checkpoint.step > step
        or (not checkpoint.problem and differences(read_marker(checkpoint.path)["fingerprint"], fingerprint))
    ]
    if others:
        set_aside(output_dir, others)


def set_aside(output_dir: Path, paths: list[Path]) -> None:
    """Move files and folders of an earlier run to output_dir/superseded/1, /2, ..."""
    number = 1
    while (folder := output_dir / SUPERSEDED / str(number)).exists():
        number += 1
    folder.mkdir(parents=True)
    for path in paths:
        os.replace(path, folder / path.name)
    logger.warning("an earlier run's %s moved to %s", ", ".join(path.name for path in paths), folder)

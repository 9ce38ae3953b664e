"""complete.json, the marker of a whole checkpoint: what was saved, every file with its size and checksum, and its own.

Written last, so that a folder without it was cut off. What a checkpoint must hold is stated here (`lacking`), not taken
from what lies in the folder. Checksums are xxh3: they find damage, not forgery, at the speed of memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from amopo_fast.errors import CheckpointError
from amopo_fast.survival.safety import unreadable

MARKER = "complete.json"
STATE_FILE = "amopo_state_{rank}.pt"
FORMAT = 2  # of the marker; the first had no checksum of itself, and is read

_CHANGED = "was changed since it was saved, or its disk is failing: its checksum is another"
_COUNT = {"type": "integer", "minimum": 0}
_OBJECTS = {"type": "object", "additionalProperties": {"type": "object"}}
_FILE = {"type": "object", "required": ["bytes", "xxh3"], "properties": {"bytes": _COUNT, "xxh3": {"type": "string"}}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["step", "world_size", "model_only", "fingerprint", "files"],
    "properties": {
        "format": {"const": FORMAT},
        "step": _COUNT,
        "world_size": {"type": "integer", "minimum": 1},
        "model_only": {"type": "boolean"},
        "fingerprint": _OBJECTS,
        "schedule": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "files": {"type": "object", "additionalProperties": _FILE},
    },
}

# One of each is in a checkpoint, by what wrote it: Trainer, FSDP, DeepSpeed.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model_fsdp*",
            "global_step*")  # fmt: skip
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "global_step*")
_SCHEDULER = ("scheduler.pt", "global_step*")
# What Trainer looks for by name: one that the save did not write would be loaded in the place of one that it did.
_LOADED = ("*.safetensors", "*.safetensors.index.json", "*.pt", "*.pth", "*.bin", "*.bin.index.json", "*.distcp",
           "*.metadata")  # fmt: skip


def make_manifest(folder: Path, **marker: Any) -> dict[str, Any]:
    """What complete.json holds of a folder that was just written: `marker` and "files". Reads every file.

    Raises:
        CheckpointError: it does not hold what a checkpoint must.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": _checksum(path)} for path in paths
    }
    missing = lacking(files, marker["world_size"], marker["model_only"], _shards(folder))
    if missing:
        raise CheckpointError(f"{missing} was not written; is another run using this output_dir?")
    return {**marker, "files": files}


def lacking(names: Collection[str], world_size: int, model_only: bool, shards: Iterable[str] = ()) -> str:
    """What a checkpoint must hold and `names` do not: "" or the first in words.

    Args:
        names: of its files. world_size: ranks that saved it. model_only: saved to be loaded, not resumed.
        shards: files that its weights' index names.
    """
    ranks = range(world_size)
    parts = [("trainer_state.json",), _WEIGHTS, *((shard,) for shard in shards)]
    parts += [(STATE_FILE.format(rank=rank),) for rank in ranks]
    if not model_only:
        parts += [_OPTIMIZER, _SCHEDULER]
        parts += [(f"rng_state_{rank}.pth",) for rank in ranks] if world_size > 1 else [("rng_state.pth",)]
    for patterns in parts:
        if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
            return patterns[0]
    return ""


def sealed(content: dict[str, Any]) -> str:
    """The text of a marker: `content`, the format, and a checksum of both."""
    content = {"format": FORMAT, **{key: value for key, value in content.items() if key != "xxh3"}}
    return json.dumps({**content, "xxh3": xxhash.xxh3_128_hexdigest(json.dumps(content).encode())}, indent=1) + "\n"


def _is_sealed(text: str, content: Any) -> bool:
    """Every byte of a marker is as it was written; one of the first format has nothing to tell it by."""
    return not isinstance(content, dict) or not {"format", "xxh3"} & content.keys() or text == sealed(content)


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint: SCHEMA, and "versions" of torch and transformers."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def problem_of(folder: Path) -> str:
    """Why `folder` is not a complete checkpoint, or "", without reading more than its marker."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if not (folder / MARKER).is_file():
        return f"it has no {MARKER}: saving it was cut off, or another program wrote it"
    try:
        text = (folder / MARKER).read_bytes().decode()
        content = json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        return f"its {MARKER} cannot be read ({type(error).__name__}: {error})"
    if not _is_sealed(text, content):
        return f"its {MARKER} {_CHANGED}"
    wrong = best_match(Draft202012Validator(SCHEMA).iter_errors(content))
    if wrong is not None:
        place = ".".join(map(str, wrong.absolute_path)) or "the file"
        return f"its {MARKER} was not written by a save: {place}: {wrong.message[:120]}"
    number = folder.name.removeprefix("checkpoint-")
    if number.isdecimal() and int(number) != content["step"]:
        return f"its {MARKER} is of step {content['step']}"
    files = content["files"]
    missing = lacking(files, content["world_size"], content["model_only"])
    if missing:
        return f"its {MARKER} does not list {missing}, which a checkpoint holds"
    for name, written in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {MARKER} lists {name}, which is outside of the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != written["bytes"]:
            return f"{name} has {found} bytes, {written['bytes']} were written"
    return ""


def damage_of(folder: Path) -> str:
    """Why a run cannot go on from `folder`, or "": `problem_of`, then every file is read and compared with its
    checksum, and what would be loaded is of a form that can be loaded without running code."""
    problem = problem_of(folder)
    if problem:
        return problem
    content = read_marker(folder)
    files, step = content["files"], content["step"]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            if any(fnmatch(name, pattern) for pattern in _LOADED):
                return f"{name} was not part of the save"
            continue
        try:
            checksum = _checksum(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if checksum != files[name]["xxh3"]:
            return f"{name} {_CHANGED}"
    try:
        missing = lacking(files, content["world_size"], content["model_only"], _shards(folder))
        found = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its trainer_state.json or index of weights is of another form ({type(error).__name__}: {error})"
    if missing or found != step:
        return f"{missing} is not there" if missing else f"its trainer_state.json is of step {found}, not {step}"
    return unreadable(folder)


def _shards(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()


def _checksum(path: Path) -> str:
    status = path.stat()
    return _checksum_of(path, status.st_size, status.st_mtime_ns)


@cache  # the command line and then the trainer look at the checkpoint of a resume
def _checksum_of(path: Path, size: int, changed: int) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()

"""Secrets stay out of what a run prints and writes, and nothing that it reads can run code.

Weights are safetensors, Trainer's own states are loaded with weights_only=True, models run no code of their
repository. What is left is here: Trainer pickles its arguments, and torch.distributed.checkpoint unpickles.
"""

from __future__ import annotations

import enum
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would blank out ordinary words


def redact(text: str) -> str:
    """`text` with the values of environment variables whose names speak of secrets replaced by <$NAME>."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET.search(name):
            text = text.replace(value, f"<${name}>")
    return text


def write_arguments(folder: str | Path, args) -> None:
    """Replace the training_args.bin that Trainer wrote, a pickle that holds hub_token, by training_args.json."""
    folder = Path(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)
    (folder / "training_args.json").write_text(redact(args.to_json_string()) + "\n", encoding="utf-8")


# What the index of a torch.distributed.checkpoint folder is made of.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}  # fmt: skip


class _Foreign(Exception):
    """What no save of this package writes; the message is fit to be shown."""


def _member(of: Any, name: str) -> Any:
    """What Python 3.11.2 (Debian 12) writes for a member of an enumeration: getattr(class, name)."""
    if not (isinstance(of, type) and issubclass(of, enum.Enum) and name in of.__members__):
        raise _Foreign("builtins.getattr of what is no enumeration is not part of a checkpoint's index")
    return of[name]


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise _Foreign(f"{module}.{name} is not part of a checkpoint's index")


def unreadable(folder: str | Path) -> str:
    """Names the first file of a checkpoint that cannot be loaded, or not without running code, and why; "" if all can.

    Tensors are mapped, not read. The index of sharded parts is read with a list of allowed classes, then every entry
    that is not a tensor with weights_only=True. DeepSpeed's own files (global_step*) are left to DeepSpeed.
    """
    folder = Path(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            if name.startswith("global_step"):
                continue
            if path.name == ".metadata":
                _check_sharded(path)
            elif path.suffix in (".pt", ".pth", ".bin"):
                with safe_globals():  # numpy's, which random states are made of
                    torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    file.keys()
        except Exception as error:  # a broken pickle raises anything
            # torch's own words would advise to load it all the same
            reason = str(error) if isinstance(error, _Foreign) else type(error).__name__
            return f"{name} cannot be read without running code, or not at all ({reason})"
    return ""


def _check_sharded(path: Path) -> None:
    """Raises where torch.distributed.checkpoint would run code when it unpickles the parts of an index."""
    with path.open("rb") as file:
        metadata = _Index(file).load()
    for index, info in metadata.storage_data.items():
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            part = (path.parent / info.relative_path).resolve()
            if part.parent != path.parent.resolve():
                raise _Foreign(f"{info.relative_path} is outside of the folder")
            with part.open("rb") as file:
                file.seek(info.offset)
                torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)

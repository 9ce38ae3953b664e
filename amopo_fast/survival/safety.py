"""Secrets stay out of what a run prints and writes, and nothing that it reads can run code.

Weights are safetensors, Trainer's own states are loaded with weights_only=True, models run no code of their
repository. What is left is here: Trainer pickles its arguments, and torch.distributed.checkpoint unpickles.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from amopo_fast.errors import CheckpointError

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


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's index")


def check_sharded(folder: str | Path) -> None:
    """Refuse a checkpoint whose sharded parts would run code when torch.distributed.checkpoint unpickles them.

    Reads the index with a list of allowed classes, then every entry that is not a tensor with weights_only=True.

    Raises:
        CheckpointError: names the file.
    """
    for path in sorted(Path(folder).rglob(".metadata")):
        try:
            with path.open("rb") as file:
                metadata = _Index(file).load()
            for index, info in metadata.storage_data.items():
                if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
                    part = (path.parent / info.relative_path).resolve()
                    if part.parent != path.parent.resolve():
                        raise pickle.UnpicklingError(f"{info.relative_path} is outside of the folder")
                    with part.open("rb") as file:
                        file.seek(info.offset)
                        torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle raises anything
            raise CheckpointError(
                f"{path.parent} is not loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Resume "
                "from checkpoints that amopo-fast wrote"
            ) from error

"""Tokenized pairs that do not fit into memory: written to a file as they are made, and read from it by index."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from amopo_fast.prompts.tokens import PairTokens

_VERSION = 2
_ABSENT = -1


class TokenStore(Sequence[PairTokens]):
    """A folder of token ids, memory-mapped: `tokens.bin` (int32) and `index.bin` (int64 rows of offset, record, prompt
    id, flags, lengths and the bits of the score gaps).

    Only what is looked at is read into memory; the index takes 8 * (2 K + 6) bytes a pair.
    """

    def __init__(self, folder: str | Path):
        """Opens a folder that `write` made. Raises ValueError where it is none or is not whole."""
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=np.int32, mode="r")
            self._index = np.memmap(self.folder / "index.bin", dtype=np.int64, mode="r").reshape(about["pairs"], -1)
            whole = about["version"] == _VERSION and len(self._tokens) == about["tokens"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no tokenized pairs ({error}); remove it, it is written again") from None
        if not whole:
            raise ValueError(f"{folder} is not whole or of another version; remove it, it is written again")

    @classmethod
    def write(cls, folder: str | Path, pairs: Iterable[PairTokens]) -> TokenStore:
        """Writes the pairs as they come; the folder counts as whole only once the last one is written.

        Raises ValueError where there are none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.json").unlink(missing_ok=True)
        written = tokens = 0
        with (folder / "tokens.bin").open("wb") as body, (folder / "index.bin").open("wb") as index:
            for pair in pairs:
                parts = [*pair.prompts, pair.chosen, pair.rejected]
                lengths = [_ABSENT if part is None else len(part) for part in parts]
                bits = pair.gaps().view(np.int64)
                array("q", [tokens, pair.record, pair.prompt_id, int(pair.truncated), *lengths, *bits]).tofile(index)
                for part in parts:
                    if part is not None:
                        body.write(np.asarray(part, dtype=np.int32).tobytes())
                        tokens += len(part)
                written += 1
        if not written:
            raise ValueError("there are no pairs to write")
        about = {"version": _VERSION, "pairs": written, "tokens": tokens}
        partial = folder / "about.tmp"
        partial.write_text(json.dumps(about), encoding="utf-8")
        os.replace(partial, folder / "about.json")
        return cls(folder)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = self._index[index]
        count = (len(row) - 6) // 2  # K
        begin, record, prompt_id, truncated, *lengths = row[: count + 6].tolist()
        gaps = row[count + 6 :].view(np.float64).copy()
        parts = []
        for length in lengths:
            if length == _ABSENT:
                parts.append(None)
                continue
            parts.append(self._tokens[begin : begin + length].astype(np.int64))
            begin += length
        *prompts, chosen, rejected = parts
        return PairTokens(record, tuple(prompts), chosen, rejected, bool(truncated), gaps, prompt_id)

    def __reduce__(self):
        return TokenStore, (self.folder,)  # workers of a data loader map the file for themselves

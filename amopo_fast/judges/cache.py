"""Replies of a server on disk, by the content of their requests, so that a restart pays for nothing twice.

A line a reply: {"key", "reply", "prompt_tokens", "completion_tokens"}. A line that a kill cut short is not counted and
its request is sent again. The key is of the request's body, which holds neither the server's address nor its key.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What a server answered: the text, and the tokens that it counted, 0 where it does not count."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def key_of(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class ReplyCache:
    """Replies by key, of a file and of this process; without a path of this process alone.

    Several processes may share a file: every line is one write at its end. Raises OSError where it cannot be written.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self._known: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._begin = b""
        if self.path is not None and self.path.exists():
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                self._begin = b"\n"  # the next line does not go on with the torn one
            for line in content.splitlines():
                try:
                    value = json.loads(line)
                    reply = Reply(value["reply"], int(value["prompt_tokens"]), int(value["completion_tokens"]))
                    self._known[value["key"]] = reply
                except (ValueError, KeyError, TypeError):
                    continue  # torn

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Written before it returns; called by several threads."""
        with self._lock:
            self._known[key] = reply
            if self.path is None:
                return
            line = {"key": key, "reply": reply.text, "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens}  # fmt: skip
            data = self._begin + json.dumps(line).encode() + b"\n"
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
            self._begin = b""

"""Prompts without answers, for generation: records with `prompt` (text or messages) or `messages`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amopo_fast.data.sources.raw import raw_records
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError, shown


def read_prompts(name: str) -> list[list[dict[str, Any]]]:
    """The conversations of a file, folder or Hub name, each up to an answer; answers in the records are left out.

    Raises:
        DataError: the file cannot be read, or a record holds no prompt; names record and field.
    """
    source = Source.parse(name)
    found = []
    for raw in raw_records(source):
        if isinstance(raw, DataError):
            raise raw
        value = raw.value if isinstance(raw.value, Mapping) else {}
        field = "messages" if "messages" in value and "prompt" not in value else "prompt"
        prompt = value.get(field)
        if isinstance(prompt, str) and prompt.strip():
            found.append([{"role": "user", "content": prompt}])
            continue
        messages = list(prompt) if isinstance(prompt, (list, tuple)) else []
        while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
            messages.pop()
        if not messages or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
            remedy = "write the prompt as a string, or as a list of messages with role and content"
            kind, seen = ("missing field", "nothing") if prompt is None else ("wrong type", shown(prompt))
            raise DataError(kind, seen, remedy, source=str(source), record=raw.record, line=raw.line, field=field)
        found.append([dict(message) for message in messages])
    return found

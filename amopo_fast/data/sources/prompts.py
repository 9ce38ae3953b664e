"""Prompts without answers, for generation: records with `prompt` (text or messages) or `messages`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amopo_fast.data.checking import check_conversation
from amopo_fast.data.sources.candidate import MISSING, Candidate
from amopo_fast.data.sources.raw import raw_records
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError


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
        prompt = value.get(field, MISSING)
        if isinstance(prompt, (list, tuple)):
            messages = list(prompt)
            while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
                messages.pop()
            prompt = messages
        candidate = Candidate(raw.record, prompt, MISSING, MISSING, {}, {}, line=raw.line, names={"prompt": field})
        found.append([message.as_dict() for message in check_conversation(candidate, source=str(source))])
    return found

"""What a server is asked, from a text file, and what its reply says.

A template is plain text with placeholders: {conversation}, {dimension}, {definition}, and to score {answer}, {low},
{high}, to compare {first}, {second}. Only these are replaced, in one pass: what stands in an answer is put in as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amopo_fast.errors import DataError
from amopo_fast.judges.judge import Answer
from amopo_fast.prompts.wording import Wording
from amopo_fast.text_files import read_text

Kind = Literal["score", "compare"]
_FOLDER = Path(__file__).parent / "templates"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ALWAYS = ("conversation", "dimension", "definition")
_OWN: dict[str, tuple[str, ...]] = {"score": ("answer", "low", "high"), "compare": ("first", "second")}
_NEEDED: dict[str, tuple[str, ...]] = {"score": ("answer",), "compare": ("first", "second")}

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_NAMED_SCORE = re.compile(rf"\b(?:score|rating)\b[\s:=*\"'`]*(?:is|of)?[\s:=*\"'`]*{_NUMBER}", re.IGNORECASE)
_BARE_SCORE = re.compile(rf"^[^\w-]*{_NUMBER}(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?\W*$", re.IGNORECASE)
_VERDICT = re.compile(r"\bbetter\b[\s:=*\"'`\[]*(?:response\s+)?(A|B|tie)\b", re.IGNORECASE)
_BARE_VERDICT = re.compile(r"^\W*(?:response\s+)?(A|B|tie)\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgeTemplate:
    """The text of a request. Without {dimension} it asks the same for every dimension."""

    kind: Kind
    text: str

    @classmethod
    def load(cls, kind: Kind, path: str | Path | None = None) -> JudgeTemplate:
        """From a file; None takes the package's own.

        Raises:
            DataError: it cannot be read, or a placeholder is unknown or missing.
        """
        path = Path(path) if path else _FOLDER / f"{kind}.txt"
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            found = getattr(error, "strerror", None) or str(error)
            raise DataError("unreadable file", found, "check the path of the template", source=str(path)) from None
        allowed = (*_ALWAYS, *_OWN[kind])
        found = set(_PLACEHOLDER.findall(text))
        unknown, missing = sorted(found - set(allowed)), [name for name in _NEEDED[kind] if name not in found]
        remedy = f"use {', '.join(f'{{{name}}}' for name in allowed)}"
        if unknown:
            names = ", ".join(f"{{{name}}}" for name in unknown)
            raise DataError("unknown placeholder", names, remedy, source=str(path))
        if missing:
            names = " and ".join(f"{{{name}}}" for name in missing)
            raise DataError("missing placeholder", f"no {names}", remedy, source=str(path))
        return cls(kind, text)

    def fill(self, values: Mapping[str, str]) -> str:
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)

    def to_score(self, answer: Answer, dimension: str, wording: Wording, score_range: tuple[float, float]) -> str:
        """The request for a score of one answer in one dimension."""
        low, high = (f"{bound:g}" for bound in score_range)
        return self.fill({**_about(answer, dimension, wording), "answer": answer.text, "low": low, "high": high})

    def to_compare(self, first: Answer, second: Answer, dimension: str, wording: Wording) -> str:
        """The request for a verdict on two answers."""
        return self.fill({**_about(first, dimension, wording), "first": first.text, "second": second.text})


def _about(answer: Answer, dimension: str, wording: Wording) -> dict[str, str]:
    name = wording.name(dimension)
    return {"conversation": conversation_text(answer.messages), "dimension": name,
            "definition": wording.definitions.get(dimension, name)}  # fmt: skip


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation for a judge to read: every message under its role."""
    parts = []
    for message in messages:
        content = message.get("content") or ""
        more = {key: value for key, value in message.items() if key not in ("role", "content") and value}
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        parts.append(f"[{message['role']}]\n{text}" + (f"\n{json.dumps(more, ensure_ascii=False)}" if more else ""))
    return "\n\n".join(parts)


def _said(reply: str) -> str:
    """What a reply says behind its reasoning."""
    return reply.rpartition("</think>")[2].strip()


def read_score(reply: str, score_range: tuple[float, float]) -> float:
    """The score that a reply names last, as "Score: 4" or alone ("4", "4/5"); NaN where there is none in the range."""
    said = _said(reply)
    found = _NAMED_SCORE.findall(said) or _BARE_SCORE.findall(said)
    number = float(found[-1]) if found else math.nan
    return number if score_range[0] <= number <= score_range[1] else math.nan


def read_verdict(reply: str) -> float:
    """1 for A, 0 for B, 0.5 for a tie, as "Better: A" or alone; NaN where the reply names none."""
    said = _said(reply)
    found = _VERDICT.findall(said) or _BARE_VERDICT.findall(said)
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()] if found else math.nan

"""A pair of text: what every format becomes. It knows no tokens and no files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amopo_fast.data.sources.candidate import NO_OBJECT

DEFAULT_SCORE_RANGE = (0.0, 5.0)
PLAIN = "none"  # asks a trained model for nothing, so no dimension is called so
DEFAULT_DIMENSIONS = (NO_OBJECT, "helpfulness", "correctness", "instruction_following")  # the paper's
ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = 1 << 32  # a run numbers the pairs of a record: record + part * PARTS

# Arguments of transformers' apply_chat_template and names that it sets itself.
_NOT_FOR_TEMPLATES = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens strftime_now raise_exception".split()
)


class Message(NamedTuple):
    """One turn. `fields`: what else it holds (tool_calls, reasoning_content, name, ...) as a JSON object, "" for
    nothing, so that messages can be compared and hashed."""

    role: str
    content: str
    fields: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.fields) if self.fields else {})}


@dataclass(frozen=True)
class Pair:
    """One prompt with a chosen and a rejected response.

    Attributes:
        record: number of the record in its source, from 0; noise and errors use it.
        messages: the conversation up to the response; its last message is the user's, or a tool's result.
        chosen, rejected: the responses.
        chosen_scores, rejected_scores: by dimension; a missing key is a missing score.
        source: file or data-set name, for messages.
        part: tells apart the pairs of one record that holds several.
        chosen_fields, rejected_fields: what else the responses hold, as `Message.fields`.
        tools: the functions that the model may call, a JSON list; "" for none.
        chat_template_kwargs: the record's own variables for the chat template, a JSON object; "" for none.
    """

    record: int
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_scores: dict[str, float] = field(default_factory=dict)
    rejected_scores: dict[str, float] = field(default_factory=dict)
    source: str = ""
    part: int = 0
    chosen_fields: str = ""
    rejected_fields: str = ""
    tools: str = ""
    chat_template_kwargs: str = ""

    @property
    def prompt(self) -> tuple:
        """What makes two pairs' prompts the same."""
        return self.messages, self.tools, self.chat_template_kwargs


def prompt_key(pair: Pair) -> bytes:
    """16 bytes that are equal for equal prompts."""
    messages = [[message.role, message.content, *filter(None, [message.fields])] for message in pair.messages]
    content = [*messages, *filter(None, [pair.tools, pair.chat_template_kwargs])]
    return hashlib.blake2b(json.dumps(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def number_of(pair: Pair) -> int:
    """The pair's number in its source, which tells apart the pairs of one record."""
    return pair.record + pair.part * PARTS


def record_of(number: int) -> int:
    """The record of a pair's number."""
    return number % PARTS


def last_user(messages: Sequence[Message]) -> int:
    """Index of the user's last message, which takes the instruction. Raises ValueError where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "user":
            return index
    raise ValueError("the conversation has no message of the user")


def check_dimensions(dimensions: Sequence[str], score_range: tuple[float, float]) -> None:
    """Raises ValueError for dimension names or a score range that no data could satisfy."""
    if isinstance(dimensions, str) or not dimensions:
        raise ValueError(f"dimensions must be a non-empty list of names, got {dimensions!r}")
    if any(not isinstance(name, str) or not name.strip() for name in dimensions):
        raise ValueError(f"dimensions must be non-empty names, got {list(dimensions)!r}")
    if len(set(dimensions)) != len(dimensions):
        raise ValueError(f"dimensions must differ from each other, got {list(dimensions)!r}")
    if PLAIN in dimensions:
        raise ValueError(f"no dimension can be called {PLAIN!r}: it asks a trained model for nothing; rename it")
    if len(score_range) != 2 or not all(math.isfinite(bound) for bound in score_range):
        raise ValueError(f"score_range must be two finite numbers, got {score_range!r}")
    if score_range[0] >= score_range[1]:
        raise ValueError(f"score_range must go from low to high, got {score_range!r}")


def template_kwargs(value: Any) -> dict[str, Any]:
    """Variables for the chat template from a mapping or its JSON; {} from nothing.

    Raises ValueError for anything else, and for a name that is no variable of a template.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"write a mapping of the template's variables, found {type(value).__name__}")
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or name in _NOT_FOR_TEMPLATES:
            raise ValueError(f"{name!r} is not a variable that a chat template can be given")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be what JSON can hold ({error})") from None

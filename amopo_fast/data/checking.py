"""From a candidate's parts to a validated pair. Every format goes through `make_pair`; every error names its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from amopo_fast.data.pair import ROLES, Message, Pair, template_kwargs
from amopo_fast.data.sources.candidate import MISSING, NO_OBJECT, Candidate
from amopo_fast.errors import DataError, shown

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that data sets have for it
_FIELDS = ("tool_calls", "name", "tool_call_id")  # of a message, beside role, content and its reasoning
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_MESSAGES = "write the prompt as a string, or as a list of messages with role and content"


def make_pair(
    candidate: Candidate,
    *,
    dimensions: Sequence[str],
    score_range: tuple[float, float] = (0, 5),
    missing_scores: Literal["error", "absent"] = "error",
    source: str = "",
) -> Pair:
    """The pair that a candidate holds.

    A score that is null counts as missing. `missing_scores="absent"` leaves it out of the pair, so that the dimension
    is absent where it is the chosen side's, and counts NaN as missing, which is how tables write it; "error" makes it a
    bad record.

    Raises:
        DataError: a missing field, a wrong type (also a bool, NaN or infinity as a score), an empty prompt or
            response, text that UTF-8 cannot hold, a score out of range, identical responses, no score at all.
    """
    check = _Check(candidate, source)
    messages = check.conversation()
    chosen, chosen_fields = check.response(candidate.chosen, "chosen")
    rejected, rejected_fields = check.response(candidate.rejected, "rejected")
    # Outer blanks are no preference either, and many chat templates strip them.
    if chosen.strip() == rejected.strip() and chosen_fields == rejected_fields:
        raise check.error(
            "identical sides",
            "rejected",
            "the same text as the chosen response",
            "drop the record: it has no preference",
        )
    scores = [
        check.scores(by_dimension, side, dimensions, score_range, missing_scores)
        for side, by_dimension in (("chosen", candidate.chosen_scores), ("rejected", candidate.rejected_scores))
    ]
    if NO_OBJECT not in dimensions and not scores[0]:
        raise check.error(
            "missing field", "chosen", f"no score for any of {', '.join(dimensions)}", "add a score or drop the record"
        )
    return Pair(
        candidate.record, messages, chosen, rejected, scores[0], scores[1], source, candidate.part, chosen_fields,
        rejected_fields, check.tools(), check.template_kwargs(),
    )  # fmt: skip


def check_conversation(candidate: Candidate, *, source: str = "") -> tuple[Message, ...]:
    """The conversation of a candidate whose responses do not matter. Raises DataError as `make_pair`."""
    return _Check(candidate, source).conversation()


class _Check:
    """Validates the parts of one candidate."""

    def __init__(self, candidate: Candidate, source: str):
        self.candidate, self.source = candidate, source

    def error(self, kind: str, part: str, found: str, remedy: str) -> DataError:
        record, line, name = self.candidate.place(part)
        return DataError(kind, found, remedy, source=self.source, record=record, line=line, field=name)

    def text(self, value: Any, part: str, remedy: str, may_be_empty: bool = False) -> str:
        if value is MISSING or value is None:
            raise self.error("missing field", part, "nothing" if value is MISSING else "null", remedy)
        if not isinstance(value, str):
            raise self.error("wrong type", part, shown(value), remedy)
        if not value.strip() and not may_be_empty:
            raise self.error("empty text", part, shown(value), "fill it in or drop the record")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half of a surrogate pair, \\u{ord(value[error.start]):04x}, at character {error.start}"
            raise self.error("invalid text", part, found, "write the character whole, or remove it") from None
        return value

    # Conversations

    def conversation(self) -> tuple[Message, ...]:
        """The record's system message, its earlier turns and its prompt, in this order."""
        extras = self.candidate.extras
        for name in _NOT_TEXT:
            if extras.get(name):
                raise self.error(
                    "unsupported field", name, shown(extras[name]), "drop the record: pairs are text alone"
                )
        messages = (*self._history(extras.get("history")), *self._messages(self.candidate.prompt, "prompt"))
        system = extras.get("system")
        if system is not None and system != "":
            text = self.text(system, "system", "write the system message as a string", may_be_empty=True)
            if messages[0].role != "system":
                messages = (Message("system", text), *messages)
            elif messages[0].content.strip() != text.strip():
                raise self.error("two system messages", "system", shown(text), "leave one of them out of the record")
        if messages[-1].role not in ("user", "tool"):
            raise self.error(
                "wrong order",
                f"prompt[{len(messages) - 1}].role",
                f"the last message is the {messages[-1].role}'s",
                "end the prompt with the user's message; the responses belong into chosen and rejected",
            )
        if all(message.role != "user" for message in messages):
            raise self.error("wrong order", "prompt", "no message of the user", "begin with what the user says")
        return messages

    def _history(self, value: Any) -> tuple[Message, ...]:
        value = self._json(value, "history")
        if value is None or value == []:
            return ()
        remedy = "write earlier turns as a list of [question, answer], or of messages with role and content"
        if not isinstance(value, (list, tuple)):
            raise self.error("wrong type", "history", shown(value), remedy)
        if isinstance(value[0], Mapping):
            return self._messages(value, "history")
        messages = []
        for index, turn in enumerate(value):
            part = f"history[{index}]"
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise self.error("wrong type", part, shown(turn), remedy)
            messages.append(Message("user", self.text(turn[0], f"{part}[0]", remedy)))
            messages.append(Message("assistant", self.text(turn[1], f"{part}[1]", remedy, may_be_empty=True)))
        return tuple(messages)

    def _messages(self, prompt: Any, name: str) -> tuple[Message, ...]:
        if not isinstance(prompt, (list, tuple)):
            return (Message("user", self.text(prompt, name, _MESSAGES)),)
        if not prompt:
            raise self.error("empty text", name, "a list without messages", _MESSAGES)
        messages = []
        for index, message in enumerate(prompt):
            part = f"{name}[{index}]"
            if not isinstance(message, Mapping):
                raise self.error("wrong type", part, shown(message), _MESSAGES)
            role = message.get("role", MISSING)
            if role not in ROLES:
                kind = "missing field" if role is MISSING else "unknown role"
                raise self.error(kind, f"{part}.role", shown(role), f"use one of {', '.join(ROLES)}")
            fields = self._fields(message, part)
            content = self._content(message, fields, part, _MESSAGES, may_be_empty=role != "user")
            messages.append(Message(role, content, fields))
        return tuple(messages)

    def response(self, value: Any, side: str) -> tuple[str, str]:
        """(text, other fields) of a response, which is a string or the assistant's message."""
        remedy = "write the response as a string"
        if not isinstance(value, Mapping) or not value.keys() & {"role", "content"}:
            return self.text(value, side, remedy), ""
        fields = self._fields(value, side)
        return self._content(value, fields, side, remedy, may_be_empty=False, part_of_side=True), fields

    def _content(
        self, message: Mapping, fields: str, part: str, remedy: str, *, may_be_empty: bool, part_of_side: bool = False
    ) -> str:
        content = message.get("content", MISSING)
        calls = '"tool_calls"' in fields
        if calls and (content is MISSING or content is None):
            return ""
        if content and isinstance(content, list) and all(map(_is_text, content)):  # OpenAI's parts of a message
            content = "".join(item["text"] for item in content)
        return self.text(content, part if part_of_side else f"{part}.content", remedy, may_be_empty or calls)

    def _fields(self, message: Mapping, part: str) -> str:
        """What a message holds beside role and content, as JSON; nulls are how Arrow writes what is not there."""
        fields = {name: without_nulls(message[name]) for name in _FIELDS if message.get(name) is not None}
        reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
        if reasoning is not None:
            fields["reasoning_content"] = self.text(
                reasoning, f"{part}.reasoning_content", "write the reasoning as a string", may_be_empty=True
            )
        calls = self._json(fields.get("tool_calls"), f"{part}.tool_calls")
        if calls:
            fields["tool_calls"] = self._tool_calls(calls, f"{part}.tool_calls")
        else:
            fields.pop("tool_calls", None)
        for name, value in fields.items():
            self._dumped(value, f"{part}.{name}")
        return json.dumps(fields, ensure_ascii=False) if fields else ""

    def _tool_calls(self, calls: Any, part: str) -> list[dict]:
        remedy = 'write a list of {"type": "function", "function": {"name": ..., "arguments": {...}}}'
        if not isinstance(calls, list):
            raise self.error("wrong type", part, shown(calls), remedy)
        result = []
        for index, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name.strip():
                raise self.error("wrong type", f"{part}[{index}]", shown(call), remedy)
            function = dict(function)
            # The API writes the arguments as JSON text, which servers parse before they render.
            if isinstance(function.get("arguments"), str):
                inside = ".function" if "function" in call else ""
                arguments = self._json(function["arguments"], f"{part}[{index}]{inside}.arguments")
                if isinstance(arguments, Mapping):
                    function["arguments"] = arguments
            result.append({**call, "function": function} if "function" in call else function)
        return result

    def tools(self) -> str:
        value = without_nulls(self._json(self.candidate.extras.get("tools"), "tools"))
        if value is None or value == []:
            return ""
        if not isinstance(value, list) or any(not isinstance(tool, Mapping) for tool in value):
            remedy = "write a list of the functions' JSON schemas, or its JSON"
            raise self.error("wrong type", "tools", shown(value), remedy)
        return self._dumped(value, "tools")

    def template_kwargs(self) -> str:
        part = "chat_template_kwargs"
        try:
            value = template_kwargs(without_nulls(self.candidate.extras.get(part)))
        except ValueError as error:
            raise self.error("wrong type", part, str(error), "write a mapping of the template's variables") from None
        return json.dumps(value) if value else ""

    def _json(self, value: Any, part: str) -> Any:
        """The value of JSON text (tables have no other way to hold a list); anything else as it is."""
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            found = "values nested too deep" if isinstance(error, RecursionError) else str(error)
            raise self.error("invalid JSON", part, found, "write it as JSON") from None

    def _dumped(self, value: Any, part: str) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise self.error("wrong type", part, shown(value), "write what JSON can hold") from None
        return self.text(text, part, "write the characters whole")

    # Scores

    def scores(
        self,
        by_dimension: Mapping[str, Any],
        side: str,
        dimensions: Sequence[str],
        score_range: tuple[float, float],
        missing_scores: str,
    ) -> dict[str, float]:
        scores = {}
        low, high = score_range
        for name in dimensions:
            if name == NO_OBJECT:
                continue
            value = by_dimension.get(name)
            part = f"{side}.{name}"
            if missing_scores == "absent" and isinstance(value, float) and math.isnan(value):
                value = None
            if value is None:
                if missing_scores == "error":
                    found = "null" if name in by_dimension else "nothing"
                    remedy = "add the score, or read the data with missing_scores=absent"
                    raise self.error("missing field", part, found, remedy)
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self.error("wrong type", part, shown(value), f"write a number from {low:g} to {high:g}, unquoted")
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error("wrong type", part, f"{value}, not finite", f"write a number from {low:g} to {high:g}")
            if not low <= value <= high:
                remedy = f"write a number from {low:g} to {high:g}, or set score_min and score_max to the data's range"
                raise self.error("score out of range", part, shown(value), remedy)
            scores[name] = float(value)
        return scores


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth: tables give every record the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)

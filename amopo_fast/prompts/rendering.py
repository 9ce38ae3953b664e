"""A pair as texts: the conversation with a dimension's instruction, as the chat template writes it, and its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from amopo_fast.data.pairs import NO_OBJECT, Pair, last_user
from amopo_fast.errors import DataError
from amopo_fast.prompts.answers import AnswerFormat, CannotAnswer
from amopo_fast.prompts.chat import ChatTemplate, Refusal
from amopo_fast.prompts.encoding import CannotEncode, Encoder
from amopo_fast.prompts.truncation import with_content
from amopo_fast.prompts.wording import Wording

Order = Literal["dimension_first", "dimension_last"]

_NO_PLACE = "no place in the chat template"


@dataclass(frozen=True)
class _Conversation:
    """The messages by present dimension and what else a rendering takes; `marked`: users' texts are (encoding.py)."""

    messages: dict[str, list[dict[str, Any]]]
    tools: list
    kwargs: dict[str, Any]
    marked: bool


@dataclass(frozen=True)
class Texts:
    """A pair's renderings, with marks where a user's text spells a control token (encoding.py).

    Attributes:
        prompts: K texts up to and with the generation prompt; None where the dimension is absent.
        chosen, rejected: the responses behind it, with the end token where the template writes it.
        tail: the prompts' end that both are encoded behind.
        closed: how many of the responses have reasoning closed before them that they do not hold.
    """

    prompts: tuple[str | None, ...]
    chosen: str
    rejected: str
    tail: str
    closed: int

    @property
    def present(self) -> list[str]:
        return [text for text in self.prompts if text is not None]


class Renderer:
    """Makes the texts of pairs."""

    def __init__(
        self,
        chat: ChatTemplate,
        answers: AnswerFormat,
        encoder: Encoder,
        dimensions: Sequence[str],
        *,
        highest_score: float,
        order: Order,
        wording: str | Path | Wording | None,
    ):
        self.chat, self.answers, self.encoder = chat, answers, encoder
        self.dimensions, self.highest_score, self.order = tuple(dimensions), highest_score, order
        self.wording = Wording.load(wording)
        own = (self.wording.score, self.wording.no_object, *self.wording.names.values())
        self._wording_spells = any(map(encoder.control_text, (*own, *self.wording.definitions.values())))

    def instruction(self, pair: Pair, dimension: str) -> str:
        """The instruction of one dimension; always with the chosen side's score.

        Raises ValueError where the pair has no score for the dimension.
        """
        if dimension == NO_OBJECT:
            return self.wording.no_object_instruction([name for name in self.dimensions if name != NO_OBJECT])
        if dimension not in pair.chosen_scores:
            raise ValueError(f"record {pair.record} has no score for {dimension!r}: the dimension is absent")
        return self.wording.score_instruction(dimension, pair.chosen_scores[dimension], self.highest_score)

    def messages(self, pair: Pair, dimension: str) -> list[dict[str, Any]]:
        """f(x, d_k) as chat messages: the pair's, with the instruction in the last one of the user's."""
        instruction, user = self.instruction(pair, dimension), pair.messages[last_user(pair.messages)].content
        parts = [instruction, user] if self.order == "dimension_first" else [user, instruction]
        content = "\n\n".join(part for part in parts if part)
        return [message.as_dict() for message in with_content(pair.messages, content)]

    def present(self, pair: Pair) -> list[bool]:
        """Which of the K dimensions the pair has."""
        return [name == NO_OBJECT or name in pair.chosen_scores for name in self.dimensions]

    def spells_control(self, pair: Pair) -> bool:
        """Whether a user's text spells a control token."""
        texts = (pair.chosen, pair.rejected, pair.chosen_fields, pair.rejected_fields, pair.tools)
        return any(self.encoder.control_text(text) for message in pair.messages for text in message[1:]) or any(
            self.encoder.control_text(text) for text in texts if text
        )

    def prompts(self, pair: Pair) -> list[str | None]:
        """K texts up to and with the generation prompt; None where the dimension is absent. Raises as `texts`."""
        return self._prompts(pair, self._conversation(pair))

    def texts(self, pair: Pair) -> Texts:
        """The pair's texts.

        Raises:
            DataError: the pair has no dimension, the template refuses it, has no place for a part of it, or writes
                something else than a response.
        """
        conversation = self._conversation(pair)
        prompts = self._prompts(pair, conversation)
        present = [text for text in prompts if text is not None]
        messages = next(iter(conversation.messages.values()))
        self._check_places(pair, present[0], messages, conversation)
        # A response is written alike after every dimension's prompt: the prompt differs inside one user message.
        answers = []
        for side, content, fields in (
            ("chosen", pair.chosen, pair.chosen_fields),
            ("rejected", pair.rejected, pair.rejected_fields),
        ):
            response = {"role": "assistant", "content": content, **json.loads(fields or "{}")}
            if conversation.marked:
                response = self.encoder.marked(response)

            def render(message, _messages=messages, _conversation=conversation) -> str:
                return self._rendered(_conversation, [*_messages, message], answered=True)

            try:
                answers.append(self.answers.answer(present[0], messages[-1]["content"], response, render))
            except Refusal as error:
                remedy = "write the response so that the model's chat template takes it"
                raise error_in(pair, "refused by the chat template", str(error), remedy, side) from None
            except CannotAnswer as error:
                found = self.encoder.unmarked(error.found)
                raise error_in(pair, error.kind, found, error.remedy, side) from None
        end = self.answers.end_text
        return Texts(
            tuple(prompts),
            answers[0].text + end,
            answers[1].text + end,
            self.encoder.tail(present),
            sum(answer.closed for answer in answers),
        )

    def _conversation(self, pair: Pair) -> _Conversation:
        here = [name for name, present in zip(self.dimensions, self.present(pair), strict=True) if present]
        if not here:
            raise error_in(pair, "missing field", "no score for any dimension", "add one or drop the record")
        messages = {name: self.messages(pair, name) for name in here}
        tools, kwargs = json.loads(pair.tools or "[]"), json.loads(pair.chat_template_kwargs or "{}")
        marked = self._wording_spells or self.spells_control(pair)
        if marked:
            try:
                messages, tools = self.encoder.marked(messages), self.encoder.marked(tools)
            except CannotEncode as error:
                remedy = "write it differently or drop the record"
                raise error_in(pair, "special token in text", str(error), remedy) from None
        for name in kwargs:
            if name not in self.chat.variables:
                found = f"the chat template has no variable {name!r}"
                raise error_in(pair, _NO_PLACE, found, "correct the name or leave it out", "chat_template_kwargs")
        return _Conversation(messages, tools, kwargs, marked)

    def _rendered(self, conversation: _Conversation, messages: Sequence[dict[str, Any]], *, answered: bool) -> str:
        return self.chat.render(messages, answered=answered, tools=conversation.tools, kwargs=conversation.kwargs)

    def _prompts(self, pair: Pair, conversation: _Conversation) -> list[str | None]:
        try:
            texts = {
                name: self._rendered(conversation, messages, answered=False)
                for name, messages in conversation.messages.items()
            }
        except Refusal as error:
            remedy = "give the conversation roles and an order that the model's chat template takes"
            raise error_in(pair, "refused by the chat template", str(error), remedy, "prompt") from None
        return [texts.get(name) for name in self.dimensions]

    def _check_places(
        self, pair: Pair, prompt: str, messages: list[dict[str, Any]], conversation: _Conversation
    ) -> None:
        """Raises DataError for a part of the conversation that the template leaves out."""

        def no_place(what: str, field: str) -> DataError:
            remedy = "take a chat_template that writes it, or leave it out of the data"
            return error_in(pair, _NO_PLACE, f"the chat template does not write {what} as it stands", remedy, field)

        for index, message in enumerate(messages):
            content = message["content"]
            if self.answers.tags is not None and message["role"] == "assistant":
                content = content.rpartition(self.answers.tags.close)[2]  # reasoning of the past is left out by intent
            if content.strip() not in prompt:
                raise no_place(f"the {message['role']}'s message", f"prompt[{index}]")
            for call in message.get("tool_calls", ()):
                if call.get("function", call).get("name", "") not in prompt:
                    raise no_place("tool_calls", f"prompt[{index}].tool_calls")
        if conversation.tools:
            without = replace(conversation, tools=[])
            if self._rendered(without, messages, answered=False) == prompt:
                raise no_place("tools", "tools")


def error_in(pair: Pair, kind: str, found: str, remedy: str, field: str = "") -> DataError:
    """A DataError that names the pair's source and record."""
    return DataError(kind, found, remedy, source=pair.source, record=pair.record, field=field)

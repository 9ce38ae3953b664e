"""How a chat template writes an answer: what it puts before, around and behind it, and what becomes of reasoning.

The text of a response is what the whole conversation's rendering has behind the generation prompt, up to the end token:
with the blanks, channels and empty think blocks that the template puts there. It has to say what the data's response
says. Templates of reasoning models often do not: some drop everything before `</think>`, others write `<think>` again.
Then the response is rendered by its parts (`reasoning_content`), or, where the template has no such field, goes on from
the generation prompt as it is, as the model that answers does. What is altered in another way is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from amopo_fast.prompts.chat import ChatTemplate, Refusal, any_of

Reasoning = Literal["refuse", "close"]

_PROBE = "Xq7"  # an answer that no template holds by itself
_THOUGHT = "Zk4"
# <think>, [THINK], ◁think▷, <seed:think>
_CLOSING_TAG = re.compile(r"([<\[◁])/([\w:|]*(?:think|reason|thought)[\w:|]*)([>\]▷])", re.IGNORECASE)
_OPENING_TAG = re.compile(_CLOSING_TAG.pattern.replace("/", "", 1) + r"\s*\Z", re.IGNORECASE)


class Tags(NamedTuple):
    """What stands around reasoning."""

    open: str
    close: str


class Answer(NamedTuple):
    """An answer as it goes on from the generation prompt, without the end token.

    `closed`: whether the generation prompt opens reasoning that the response has none of, and it is closed first.
    """

    text: str
    closed: bool = False


class CannotAnswer(ValueError):
    """A response that the template does not write as the data has it.

    Attributes:
        kind, found, remedy: as of a DataError.
    """

    def __init__(self, kind: str, found: str, remedy: str):
        super().__init__(found)
        self.kind, self.found, self.remedy = kind, found, remedy


class AnswerFormat:
    """How a chat template writes answers, found by rendering one.

    Attributes:
        end_id: the token that ends an answer: the first special token that the template puts behind one, the
            tokenizer's eos token where it puts none there.
        end_text: its text as the template writes it; "" where the template does not write it.
        control: the tokens that a template sets and no user may, text by id: the special ones, and those of the
            template that are not declared special. Tags of reasoning are not among them.
        tags: what stands around reasoning; None for a template that knows none.

    Raises:
        ValueError: the template refuses or leaves out an answer, or nothing ends it.
    """

    def __init__(self, chat: ChatTemplate, tokenizer, reasoning: Reasoning = "refuse"):
        if reasoning not in get_args(Reasoning):
            raise ValueError(f"reasoning must be one of {', '.join(get_args(Reasoning))}, got {reasoning!r}")
        self._chat, self._reasoning = chat, reasoning
        question = {"role": "user", "content": "Hello"}
        exchange = [question, {"role": "assistant", "content": _PROBE}]
        try:
            prompt, text = chat.render([question], answered=False), chat.render(exchange, answered=True)
        except Refusal as error:
            raise ValueError(f"the tokenizer's chat template refuses a user's message and an answer: {error}; set "
                             "another chat_template") from None  # fmt: skip
        if _PROBE not in text:
            raise ValueError("the tokenizer's chat template leaves out the answer; set another chat_template")
        self.tags = self._find_tags(prompt)
        closing = text[text.rindex(_PROBE) + len(_PROBE) :]
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        own = {
            index: token for index, token in added.items()
            if token.strip() and not token.isalnum() and token in prompt + text
        }  # fmt: skip
        self.control = {index: token for index, token in {**special, **own}.items() if token not in (self.tags or ())}
        # A token that is not declared special ends an answer where no special one does.
        end = any_of(special.values()).search(closing) or any_of(own.values()).search(closing)
        self.end_text = end[0] if end else ""
        self._closing, self._before_end = closing, closing[: end.start()] if end else ""
        if end:
            self.end_id = {token: index for index, token in self.control.items()}[self.end_text]
        elif tokenizer.eos_token_id is None:
            raise ValueError(
                "the chat template ends a response with no special token and the tokenizer has no eos token; "
                "set tokenizer.eos_token"
            )
        else:
            self.end_id = tokenizer.eos_token_id
        self._close_text = self._find_close_text(prompt)
        self._control_pattern = any_of(self.control.values())

    def _find_tags(self, prompt: str) -> Tags | None:
        opening = _OPENING_TAG.search(prompt)
        if opening:
            left, name, right = opening.groups()
            return Tags(f"{left}{name}{right}", f"{left}/{name}{right}")
        closing = _CLOSING_TAG.search(self._chat.source)
        if closing:
            left, name, right = closing.groups()
            return Tags(f"{left}{name}{right}", closing[0])
        return None

    def _find_close_text(self, prompt: str) -> str:
        """What the template puts between reasoning and answer; in the manner of its opening where it shows neither."""
        if self.tags is None:
            return ""
        question = {"role": "user", "content": "Hello"}
        inside = f"{self.tags.open}\n{_THOUGHT}\n{self.tags.close}\n\n{_PROBE}"
        for answer in ({"content": _PROBE, "reasoning_content": _THOUGHT}, {"content": inside}):
            try:
                text = self._chat.render([question, {"role": "assistant", **answer}], answered=True)
            except Refusal:
                continue
            _, thought, rest = text.rpartition(_THOUGHT)
            between, found, _ = rest.partition(_PROBE)
            if thought and found and between.count(self.tags.close) == 1:
                return between
        lines = prompt.endswith("\n") or not self._opens(prompt)
        return f"\n{self.tags.close}\n\n" if lines else self.tags.close

    def _opens(self, prompt: str) -> bool:
        return self.tags is not None and prompt.rstrip().endswith(self.tags.open)

    # One answer

    def answer(
        self, prompt: str, user: str, response: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]
    ) -> Answer:
        """The text of a response behind its prompt.

        Args:
            prompt: the rendering up to and with the generation prompt.
            user: the last message's content in it.
            response: the assistant's message.
            render: from that message to the rendering of the whole conversation.

        Raises:
            CannotAnswer: the template writes something else than the response.
            Refusal: the template takes no such answer.
        """
        content = response["content"]
        reasons = self.tags is not None and (self.tags.close in content or bool(response.get("reasoning_content")))
        if reasons and prompt.rstrip().endswith(self.tags.close):
            raise CannotAnswer(
                "reasoning behind its end",
                f"reasoning, where the generation prompt ends in {self.tags.close}",
                "render with reasoning, as chat_template_kwargs: {enable_thinking: true}, or leave it out of the data",
            )
        full = render(response)
        body = self._body(prompt, user, full)
        if body is not None and self._says(body, response, prompt):
            return Answer(body)
        if response.get("tool_calls"):
            raise _no_place("tool_calls")
        if reasons:
            return Answer(self._with_reasoning(prompt, user, response, body, render))
        if response.get("reasoning_content"):
            raise _no_place("reasoning_content")
        written = self._written(body, content) if body is not None else content + self._before_end
        if written is None:
            raise CannotAnswer(
                "altered by the chat template",
                f"a response that the template does not write as it stands: {self._difference(content, full)}",
                "set another chat_template on the tokenizer, or write the response as the template does",
            )
        if not self._opens(prompt):
            return Answer(written)
        if self._reasoning == "refuse":
            raise CannotAnswer(
                "reasoning left open",
                f"no reasoning in the response, where the generation prompt opens {self.tags.open}",
                f"set reasoning: close, which puts {self.tags.close} before such responses, add the reasoning and "
                f"{self.tags.close} to the data, or take another chat_template",
            )
        return Answer(self._close_text + written.lstrip("\n"), closed=True)

    def _body(self, prompt: str, user: str, full: str) -> str | None:
        """What the conversation's text has behind the prompt, up to the end token; None where the prompt's end is not
        in it, as the template writes a conversation otherwise once it is answered."""
        if full.startswith(prompt):
            body = full[len(prompt) :]
        else:
            matches = list(self._control_pattern.finditer(prompt))
            end = prompt[matches[-1].start() :] if matches else prompt.rpartition(user.strip())[2]
            place = full.rfind(end) if end else -1
            if place < 0 and self._opens(prompt):
                end = end.rstrip().removesuffix(self.tags.open)
                place = full.rfind(end) if end else -1
            if place < 0:
                return None
            body = full[place + len(end) :]
        if self._closing and body.endswith(self._closing):
            return body[: -len(self._closing)] + self._before_end
        if self.end_text and self.end_text in body:
            return body[: body.rindex(self.end_text)]
        return body

    def _says(self, body: str, response: Mapping[str, Any], prompt: str) -> bool:
        """Whether the text says what the response says, blanks around it and around tags aside."""
        content = response["content"]
        if self.tags is not None and (self.tags.close in content or self.tags.open in content):
            opened = self._opens(prompt)
            have, want = self._squeezed(self.tags.open * opened + body), self._squeezed(content)
            if opened and not want.startswith(self.tags.open):
                want = self.tags.open + want
            return have.endswith(want) and have.count(self.tags.open) == want.count(self.tags.open)
        content = content.strip()
        calls = response.get("tool_calls") or ()
        place = body.find(content) if calls else len(body.rstrip()) - len(content)
        if place < 0 or body[place : place + len(content)] != content:
            return False
        before = body[:place]
        if self._opens(prompt) and self.tags.close not in before:
            return False
        reasoning = response.get("reasoning_content") or ""
        names = [call.get("function", call).get("name", "") for call in calls]
        return reasoning.strip() in before and all(name in body[place + len(content) :] for name in names)

    def _squeezed(self, text: str) -> str:
        tags = "|".join(map(re.escape, self.tags))
        return re.sub(rf"\s*({tags})\s*", r"\1", text.strip())

    def _written(self, body: str, content: str) -> str | None:
        """The body where it is the response with blanks around it or with something of the template's before it."""
        return body if body.rstrip().endswith(content.strip()) else None

    def _with_reasoning(
        self, prompt: str, user: str, response: Mapping[str, Any], body: str | None, render: Callable
    ) -> str:
        """The text of a response that holds reasoning, in its own field or between tags."""
        tags, content = self.tags, response["content"]
        if response.get("reasoning_content"):  # a field that the template does not read
            content = f"{tags.open}\n{response['reasoning_content']}\n{tags.close}\n\n{content}"
        inside, _, rest = content.partition(tags.close)
        inside = inside.lstrip().removeprefix(tags.open)
        plain = {key: value for key, value in response.items() if key != "reasoning_content"}
        whole = {**plain, "content": content}
        parts = {"content": rest.lstrip("\n"), "reasoning_content": inside.strip("\n")}
        for other in (parts, {"content": content}, {"content": f"{inside.lstrip()}{tags.close}{rest}"}):
            found = self._body(prompt, user, render({**plain, **other}))
            if found is not None and self._says(found, whole, prompt):
                return found
        # The template drops the reasoning of answers that are past. The one that is being given begins with it.
        if body is None or body.strip() != rest.strip():
            raise CannotAnswer(
                "altered by the chat template",
                "reasoning that the template does not write as it stands",
                "set another chat_template on the tokenizer, or leave the reasoning out of the data",
            )
        if self._opens(prompt):
            blanks = prompt[len(prompt.rstrip()) :]
            return f"{inside.lstrip() if blanks else inside}{tags.close}{rest}" + self._before_end
        return content + self._before_end

    @staticmethod
    def _difference(content: str, full: str) -> str:
        """The first line of a response that its rendering does not have."""
        line = next((line for line in content.splitlines() if line.strip() not in full), content)
        return repr(line.strip()[:60])


def _no_place(field: str) -> CannotAnswer:
    return CannotAnswer(
        f"no place for {field}",
        f"{field}, which the chat template does not write",
        "take a chat_template that writes them, or leave them out of the data",
    )

"""A tokenizer's chat template as a function from messages to text, the same on every day of a run."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from amopo_fast.prompts.template import CLOCK, frozen_clock, without_dimensions
from amopo_fast.prompts.template_probe import check_template

# For tokenizers without a template. Its marks are plain text to a vocabulary that does not know them.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPARE_CHARACTERS = 1 << 20  # of a rendering, beside eight times what goes into it



class Refusal(ValueError):
    """A conversation that the template does not take; the message is the template's own, on one line."""


class ChatTemplate:
    """The text that a tokenizer's chat template makes of messages.

    Attributes:
        source: the template's text; with tools another one may be used.
        variables: names that the template reads and does not set.
        date: ISO date that its clock shows; None where it reads no clock.

    Args:
        tokenizer: its model's own chat template is used, without the prefix of a trained folder; ChatML where it has
            none.
        date: ISO date for templates that read the clock; None takes today's.
        kwargs: variables for the template (`enable_thinking`), for all renderings.

    Raises:
        ValueError: the template is no Jinja, loops or explodes, has no variable of a name in `kwargs`, or leaves out a
            user's message or the answer to it.
    """

    def __init__(self, tokenizer, *, date: str | None = None, kwargs: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        # With tools, a tokenizer may have a second template.
        self._sources = [self._source(tools) for tools in (None, [{"type": "function"}])]
        self.source = self._sources[0]
        self.kwargs = dict(kwargs or {})
        # Before anything else is done with it: to compile a template is to compute its constants.
        special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
        for source in dict.fromkeys(self._sources):
            check_template(source, {**special, **self.kwargs, "messages": exchange, "add_generation_prompt": False})
        self.variables = frozenset().union(*map(variables_of, self._sources))
        self.date = None
        if CLOCK in self.variables:
            self.date = date or datetime.date.today().isoformat()
            self._sources = [frozen_clock(self.date) + source for source in self._sources]
        for name in self.kwargs:
            if name not in self.variables:
                raise ValueError(f"chat_template_kwargs: the chat template has no variable {name!r}; leave it out")

    def _source(self, tools: list | None) -> str:
        if self._tokenizer.chat_template is None:
            return fallback_template(self._tokenizer)
        return without_dimensions(self._tokenizer.get_chat_template(None, tools))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answered: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation's text: with its answer, or (`answered=False`) up to and with the generation prompt.

        Raises:
            Refusal: the template raises, or makes far more text than went into it.
        """
        source = self._sources[bool(tools)]
        try:
            text = self._tokenizer.apply_chat_template(
                [with_reasoning_names(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not answered,
                chat_template=source,
                tools=list(tools) or None,
                **{**self.kwargs, **(kwargs or {})},
            )
        except Exception as error:  # a template is a program: any of Python's errors may come out of it
            found = " ".join(str(error).split())[:300]
            if not isinstance(error, jinja2.TemplateError):
                found = f"{type(error).__name__}: {found}"
            raise Refusal(found or type(error).__name__) from None
        limit = _SPARE_CHARACTERS + 8 * _characters([*messages, *tools])
        if len(text) > limit:
            raise Refusal(f"it makes {len(text)} characters of a conversation of {_characters(messages)}")
        return text


def with_reasoning_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read, as transformers >= 5.24 gives it to them."""
    reasoning = message.get("reasoning_content")
    return {"thinking": reasoning, **message} if reasoning is not None else dict(message)


def variables_of(source: str) -> set[str]:
    """Names that a template reads and does not set. Raises ValueError where it is no Jinja."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[_Generation, jinja2.ext.loopcontrols])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(source))
    except (jinja2.TemplateError, RecursionError) as error:
        found = " ".join(str(error).split())
        raise ValueError(f"the tokenizer's chat template is no valid Jinja: {found}; correct it, or set another "
                         "chat_template") from None  # fmt: skip


class _Generation(jinja2.ext.Extension):
    """transformers' {% generation %}, for reading alone."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def fallback_template(tokenizer) -> str:
    """ChatML, behind the begin token where the tokenizer begins a text with it."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts else "") + CHATML


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 8


def any_of(texts) -> re.Pattern:
    """A pattern of any of the texts, the longest first, so that it finds a token and not its beginning."""
    return re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or "(?!)")

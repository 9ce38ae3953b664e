"""A chat template that knows the dimensions: with it, every server can ask a trained model for one.

    tokenizer.apply_chat_template(messages, dimension="helpfulness", score=5, add_generation_prompt=True)

A prefix of Jinja stands before the model's own template and puts the instruction into the last user message, where
training had it. Without arguments that is the instruction of `no_object`, if the model was trained with it;
dimension="none" leaves the message as it is; scores={"helpfulness": 5, "brevity": 2} asks for several, a line each,
which training never did. It runs wherever transformers renders templates: vLLM and `transformers serve` hand
`chat_template_kwargs` on.
"""

from __future__ import annotations

import copy
import datetime
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from amopo_fast.data.pair import PLAIN
from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.prompts.wording import Wording

CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZz"
_BEGIN = "{#- amopo-fast: the dimensions this model was trained with; the model's own template begins below -#}\n"
_END = "{%- set amopo_end = true %}\n"

# Variables begin with amopo_, so that none of the template's own is touched.
_BODY = string.Template("""\
{%- set amopo_scored = $scored -%}
{%- set amopo_constant = $constant -%}
{%- set amopo_choices = $choices -%}
{%- set amopo_low = $low -%}
{%- set amopo_high = $high -%}
$defaults{%- set amopo = namespace(parts=[], user=-1) -%}
{%- if scores is defined and scores is not none -%}
{%- if dimension is defined and dimension is not none -%}
{{- raise_exception("give dimension and score, or scores, not both") -}}
{%- endif -%}
{%- set amopo_asked = scores.items() | list -%}
{%- elif dimension is defined and dimension is not none -%}
{%- set amopo_asked = [(dimension, score if score is defined else none)] -%}
{%- elif score is defined and score is not none -%}
{{- raise_exception("a score needs its dimension: choose one of " ~ amopo_choices) -}}
{%- else -%}
{%- set amopo_asked = [($default, none)] -%}
{%- endif -%}
{%- for amopo_name, amopo_score in amopo_asked -%}
{%- if amopo_name in amopo_scored -%}
{%- set amopo_number = amopo_score | float(default=none) if amopo_score is not boolean else none -%}
{%- if amopo_number is none or not amopo_low <= amopo_number <= amopo_high -%}
{{- raise_exception("dimension " ~ amopo_name ~ " needs a score from " ~ "%g"|format(amopo_low) ~ " to " ~ "%g"|format(amopo_high) ~ ", found " ~ amopo_score) -}}
{%- endif -%}
{%- set amopo.parts = amopo.parts + [amopo_scored[amopo_name] | join("%g"|format(amopo_number))] -%}
{%- elif amopo_name == "none" or amopo_name in amopo_constant -%}
{%- if amopo_score is not none -%}
{{- raise_exception("dimension " ~ amopo_name ~ " takes no score") -}}
{%- endif -%}
{%- set amopo.parts = amopo.parts + ([amopo_constant[amopo_name]] if amopo_constant[amopo_name] else []) -%}
{%- else -%}
{{- raise_exception("unknown dimension " ~ amopo_name ~ ": choose one of " ~ amopo_choices) -}}
{%- endif -%}
{%- endfor -%}
{%- if amopo.parts -%}
{%- for amopo_message in messages -%}
{%- if amopo_message["role"] == "user" -%}
{%- set amopo.user = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- if amopo.user < 0 -%}
{{- raise_exception("there is no user message to put the instruction into") -}}
{%- endif -%}
{%- set amopo_text = amopo.parts | join("\\n") -%}
{%- set amopo_content = messages[amopo.user]["content"] -%}
{%- if amopo_content is not string -%}
{%- set amopo_content = $listed -%}
{%- elif amopo_content -%}
{%- set amopo_content = $joined -%}
{%- else -%}
{%- set amopo_content = amopo_text -%}
{%- endif -%}
{%- set messages = (messages | list)[:amopo.user] + [dict(messages[amopo.user], content=amopo_content)] + (messages | list)[amopo.user + 1:] -%}
{%- endif -%}
""")  # noqa: E501
_JOINED = {
    "dimension_first": (
        'amopo_text ~ "\\n\\n" ~ amopo_content',
        '[{"type": "text", "text": amopo_text ~ "\\n\\n"}] + amopo_content',
    ),
    "dimension_last": (
        'amopo_content ~ "\\n\\n" ~ amopo_text',
        'amopo_content + [{"type": "text", "text": "\\n\\n" ~ amopo_text}]',
    ),
}


def with_dimensions(
    template: str,
    *,
    dimensions: Sequence[str],
    wording: Wording,
    order: str,
    score_range: tuple[float, float],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> str:
    """`template` behind the prefix that asks for dimensions; one that has a prefix gets this one in its place.

    Args:
        template: the model's own chat template.
        order: "dimension_first" or "dimension_last".
        score_range: lowest and highest score that may be asked for.
        chat_template_kwargs: what training gave the template; the default where a caller gives nothing.
        date: ISO date that a template which reads the clock was shown in training, and is shown from now on.
    """
    scored = {name: wording.around_the_score(name, score_range[1]) for name in dimensions if name != NO_OBJECT}
    constant = {}
    if NO_OBJECT in dimensions:
        constant[NO_OBJECT] = wording.no_object_instruction([name for name in dimensions if name != NO_OBJECT])
    joined, listed = _JOINED[order]
    defaults = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}\n"
        for name, value in (chat_template_kwargs or {}).items()
    )
    values = {
        "scored": _literal(scored), "constant": _literal(constant), "low": repr(float(score_range[0])),
        "high": repr(float(score_range[1])), "choices": _literal(", ".join([*dimensions, PLAIN])),
        "default": _literal(NO_OBJECT if constant else PLAIN), "joined": joined, "listed": listed, "defaults": defaults,
    }  # fmt: skip
    clock = frozen_clock(date) + "\n" if date else ""
    return _BEGIN + clock + _BODY.substitute(values) + _END + without_dimensions(template)


def without_dimensions(template: str) -> str:
    """The model's own template: what stands behind the prefix, or all of it where there is none."""
    return template.split(_END, 1)[1] if template.startswith(_BEGIN) else template


def change_templates(tokenizer, change) -> Any:
    """A copy of a tokenizer (or processor) whose chat template, or each of several by name, is `change(template)`."""
    changed = copy.copy(tokenizer)
    template = tokenizer.chat_template
    named = isinstance(template, dict)
    changed.chat_template = {name: change(text) for name, text in template.items()} if named else change(template)
    return changed


def frozen_clock(date: str) -> str:
    """Jinja text that, put before a template, makes its `strftime_now` tell midnight of `date` (ISO, "2025-01-31").

    The template's own formats go through it unchanged: each directive of strftime is replaced by its value. Works
    wherever the template is rendered, a server too, as it needs no function of the host.
    """
    day = datetime.datetime.fromisoformat(date)
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    values |= {f"%-{letter}": (values[f"%{letter}"].lstrip("0") or "0") for letter in "dmHIMSj"}
    # %% first, into something that no format holds; a value holds no directive.
    chain = ["replace('%%', '\\x00')", *(f"replace({key!r}, {value!r})" for key, value in values.items())]
    filters = " | ".join([*chain, "replace('\\x00', '%')"])
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format | {filters} -}}}}{{%- endmacro -%}}"


def prompt_of(
    tokenizer,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    dimension: str | None = None,
    score: float | None = None,
    scores: Mapping[str, float] | None = None,
    **chat_template_kwargs: Any,
) -> list[int]:
    """Token ids of a conversation up to the answer, asked for a dimension: what the model was trained to continue.

    Args:
        tokenizer: of a folder that `amopo-fast train` wrote, or one whose template `with_dimensions` made.
        messages: the conversation, its last user message last; a text is one user message.
        dimension, score: what is asked for; neither is the instruction that names all dimensions. "none" asks for
            nothing.
        scores: several dimensions with their scores instead.
        chat_template_kwargs: handed to the template.

    Raises:
        ValueError: the tokenizer's template knows no dimensions, or the template refuses: an unknown dimension, a score
            out of range; or a text is no UTF-8.
    """
    template = tokenizer.chat_template
    known = template.get("default", "") if isinstance(template, Mapping) else template or ""
    if not known.startswith(_BEGIN):
        raise ValueError(
            "the tokenizer's chat template knows no dimensions: load the tokenizer of a folder that amopo-fast train "
            "wrote, or give one prefix with prompts.template.with_dimensions"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    asked = {"dimension": dimension, "score": score, "scores": scores}
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **asked, **chat_template_kwargs
        )
    except jinja2.TemplateError as error:
        raise ValueError(" ".join(str(error).split())) from None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # what a terminal makes of bytes that are no UTF-8
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"the prompt holds half of a character, {half}: write it whole, in UTF-8") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _literal(value: Any) -> str:
    """A value of JSON's kinds as Jinja writes it: as JSON does, but for null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)

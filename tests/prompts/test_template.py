"""A served chat template asks for dimensions: token for token the prompts of training, and nothing else changes."""

import jinja2
import pytest
from transformers import AutoTokenizer

from amopo_fast.data.pairs import Message, Pair
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.template import (
    change_templates,
    prompt_of,
    with_dimensions,
    without_dimensions,
)
from amopo_fast.prompts.wording import Wording

DIMENSIONS = ("no_object", "helpfulness", "terse style")
NASTY = Wording(
    score='Aim at {score} of {max} ({score}!) for {dimension}:\n\t"{definition}" \\ {{ x }} {% endif %} #} \u2028 😀',
    no_object="All of: {dimensions} {# no comment #}",
    names={"helpfulness": 'help"ful\\ness'},
    definitions={"terse style": "few '''words''' -%} {score}"},
)
TALKS = [
    (Message("user", "What is it?"),),
    (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hi."), Message("user", "{{now}}?")),
]


def served(tokenizer, builder, **options):
    def change(template):
        return with_dimensions(
            template, dimensions=builder.dimensions, wording=builder.wording, order=builder.order,
            score_range=builder.score_range, **options,
        )  # fmt: skip

    return change_templates(tokenizer, change)


@pytest.mark.parametrize("order", ["dimension_first", "dimension_last"])
@pytest.mark.parametrize("wording", [Wording.load(), NASTY], ids=["own", "nasty"])
@pytest.mark.parametrize("talk", TALKS, ids=["one turn", "several"])
def test_asking_gives_the_prompt_of_training(tmp_path, order, wording, talk):
    tokenizer = demo_tokenizer()
    builder = PromptBuilder(tokenizer, DIMENSIONS, order=order, max_length=10_000, template=wording, score_range=(1, 7))
    served(tokenizer, builder).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)  # the template survives saving
    messages = [message._asdict() for message in talk]
    for score in (1, 4.25, 7.0):
        pair = Pair(0, talk, "Yes.", "No.", dict.fromkeys(DIMENSIONS[1:], score), {})
        for dimension, expected in zip(DIMENSIONS, builder.tokens(pair).prompts, strict=True):
            asked = {"dimension": dimension, **({} if dimension == "no_object" else {"score": score})}
            assert prompt_of(loaded, messages, **asked) == expected.tolist()
            found = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **asked)
            assert found == expected.tolist()
        assert prompt_of(loaded, messages) == builder.tokens(pair).prompts[0].tolist()
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_of(loaded, messages, dimension="none") == plain
    assert without_dimensions(loaded.chat_template) == tokenizer.chat_template


def test_several_dimensions_are_a_line_each():
    tokenizer = demo_tokenizer()
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    text = served(tokenizer, builder).apply_chat_template(
        [{"role": "user", "content": "Q"}], scores={"helpfulness": 5, "terse style": "2"}, tokenize=False
    )
    asked = {"helpfulness": 5, "terse style": 2}
    lines = [builder.wording.score_instruction(name, score, 5) for name, score in asked.items()]
    assert text == "<|im_start|>user\n" + "\n".join(lines) + "\n\nQ<|im_end|>\n"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dimension": "speed", "score": 3}, "speed: choose one of no_object, helpfulness, terse style, none"),
        ({"dimension": "helpfulness"}, "helpfulness needs a score from 0 to 5, found None"),
        ({"dimension": "helpfulness", "score": 5.1}, "found 5.1"),
        ({"dimension": "helpfulness", "score": -1}, "found -1"),
        ({"dimension": "helpfulness", "score": "high"}, "found high"),
        ({"dimension": "helpfulness", "score": True}, "found True"),
        ({"dimension": "helpfulness", "score": float("nan")}, "found nan"),
        ({"dimension": "no_object", "score": 3}, "no_object takes no score"),
        ({"dimension": "none", "score": 3}, "none takes no score"),
        ({"score": 3}, "a score needs its dimension"),
        ({"dimension": "helpfulness", "score": 3, "scores": {"helpfulness": 3}}, "not both"),
        ({"scores": {"speed": 3}}, "unknown dimension speed"),
    ],
)
def test_what_cannot_be_asked_for_is_named(asked, message):
    tokenizer = demo_tokenizer()
    changed = served(tokenizer, PromptBuilder(tokenizer, DIMENSIONS))
    with pytest.raises(jinja2.TemplateError, match=message):
        changed.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False, **asked)
    with pytest.raises(ValueError, match=message):
        prompt_of(changed, "Q", **asked)


def test_a_tokenizer_that_knows_no_dimensions_is_named():
    with pytest.raises(ValueError, match="knows no dimensions"):
        prompt_of(demo_tokenizer(), "Q", dimension="helpfulness", score=5)


def test_without_no_object_nothing_is_asked_for_by_default():
    tokenizer = demo_tokenizer()
    changed = served(tokenizer, PromptBuilder(tokenizer, ["helpfulness"]))
    assert prompt_of(changed, "Q") == prompt_of(changed, "Q", dimension="none")


def test_the_templates_own_blanks_and_options_stay():
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = (
        "\n  {% if true %}\n   {{ messages[-1]['content'] }} {{ enable_thinking }} {{ depth }}\n  {% endif %}\n\n"
    )
    builder = PromptBuilder(demo_tokenizer(), DIMENSIONS)
    own = {"enable_thinking": False, "depth": [1, None, {"a": "b"}]}
    changed = served(tokenizer, builder, chat_template_kwargs=own)
    messages = [{"role": "user", "content": "Q"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **own)
    assert changed.apply_chat_template(messages, tokenize=False, dimension="none") == expected
    asked = {"enable_thinking": True, "depth": 2}
    other = tokenizer.apply_chat_template(messages, tokenize=False, **asked)
    assert changed.apply_chat_template(messages, tokenize=False, dimension="none", **asked) == other


def test_a_prefix_is_replaced_and_named_templates_get_one_each():
    tokenizer = demo_tokenizer()
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    twice = served(served(tokenizer, builder), builder)
    assert twice.chat_template == served(tokenizer, builder).chat_template
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    named = served(tokenizer, builder)
    assert all("amopo_scored" in template for template in named.chat_template.values())
    assert prompt_of(named, "Q") == prompt_of(twice, "Q")


def test_the_last_user_message_is_asked_whatever_follows_it():
    tokenizer = demo_tokenizer()
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    changed = served(tokenizer, builder)
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = changed.apply_chat_template(talk, tokenize=False, dimension="helpfulness", score=2)
    assert text.count("rate 2 out of 5") == 1 and text.index("rate 2") < text.index("Q") < text.index("A<|im_end|>")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
    shown = change_templates(changed, lambda t: t.replace(without_dimensions(t), "{{ messages[0]['content'] }}"))
    rendered = shown.apply_chat_template(parts, tokenize=False, dimension="helpfulness", score=2)
    assert rendered.index("rate 2 out of 5") < rendered.index("'text': 'Q'")
    with pytest.raises(ValueError, match="no user message"):
        prompt_of(changed, [{"role": "system", "content": "S"}], dimension="helpfulness", score=2)

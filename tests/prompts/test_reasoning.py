"""Reasoning: what the data's response says is what is trained, once, or the record is refused with a remedy."""

import pytest
import tokenizers_for_tests as chat
from chat_templates import DOUBLE_THINK, FAMILIES, Family

from amopo_fast.data.pairs import Message, Pair
from amopo_fast.errors import DataError
from amopo_fast.prompts.builder import CLOSED, PromptBuilder

DIMENSIONS = ("no_object", "helpfulness")
DOUBLE = Family(DOUBLE_THINK, "bytes", ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"), eos="<|im_end|>")
WHY = "One, two."
RESPONSE = f"<think>\n{WHY}\n</think>\n\nIt is 3."


def make_pair(chosen=RESPONSE, rejected="<think>\nNo.\n</think>\n\nIt is 4.", turns=(), **fields):
    messages = (*turns, Message("user", "1 + 2?"))
    return Pair(7, messages, chosen, rejected, {"helpfulness": 4.0}, {}, "file.json", **fields)


def builder_of(name, **options):
    family = DOUBLE if name == "double" else FAMILIES[name]
    return PromptBuilder(chat.family_tokenizer(family), DIMENSIONS, template_date="2025-02-03", **options)


def texts(builder, pair):
    """(the prompt's end, the chosen response), decoded."""
    tokens = builder.tokens(pair)
    decode = builder.tokenizer.decode
    return decode(tokens.prompts[0])[-40:], decode(tokens.chosen)


THINKS = f"<think>\n{WHY}\n</think>\n\nIt is 3."
CASES = [
    # name, response, options, the end of the prompt, the labels without the end token
    ("qwen-3", RESPONSE, {}, "assistant\n", THINKS),
    ("qwen-3", f"<think>{WHY}</think>It is 3.", {}, "assistant\n", THINKS),  # in the template's own form
    ("qwen-3", "It is 3.", {}, "assistant\n", "<think>\n\n</think>\n\nIt is 3."),
    ("qwen-3", "It is 3.", {"enable_thinking": False}, "<think>\n\n</think>\n\n", "It is 3."),
    ("qwen-3-thinking", RESPONSE, {}, "<think>\n", f"{WHY}\n</think>\n\nIt is 3."),
    ("qwen-3-thinking", "It is 3.", {}, "<think>\n", "\n</think>\n\nIt is 3."),  # closed by the template itself
    ("deepseek-r1-old", RESPONSE, {}, "<｜Assistant｜>", THINKS),
    ("deepseek-r1-old", "It is 3.", {}, "<｜Assistant｜>", "It is 3."),
    ("deepseek-r1", RESPONSE, {}, "<think>\n", f"{WHY}\n</think>\n\nIt is 3."),
    ("deepseek-r1", f"{WHY}\n</think>\n\nIt is 3.", {}, "<think>\n", f"{WHY}\n</think>\n\nIt is 3."),
    ("double", RESPONSE, {}, "<think>\n", f"{WHY}\n</think>\n\nIt is 3."),
    ("double", f"{WHY}\n</think>\n\nIt is 3.", {}, "<think>\n", f"{WHY}\n</think>\n\nIt is 3."),
    ("smollm-3", RESPONSE, {}, "assistant\n", THINKS),
    ("smollm-3", "It is 3.", {"enable_thinking": False}, "<think>\n\n</think>\n", "It is 3."),
    ("glm", "It is 3.", {}, "<|assistant|>", "\n<think></think>\nIt is 3."),
    ("glm", RESPONSE, {}, "<|assistant|>", f"\n<think>{WHY}</think>\nIt is 3."),
    ("glm", "It is 3.", {"enable_thinking": False}, "<think></think>", "\nIt is 3."),
    ("gpt-oss", "It is 3.", {}, "<|start|>assistant", "<|channel|>final<|message|>It is 3."),
    ("gpt-oss", "It is 3.", {"reasoning_effort": "low"}, "<|start|>assistant", "<|channel|>final<|message|>It is 3."),
    ("qwen-2.5", RESPONSE, {}, "assistant\n", RESPONSE),  # a template that knows none: text as any other
]


@pytest.mark.parametrize(("name", "response", "kwargs", "end", "labels"), CASES)
def test_a_response_says_what_the_data_says_once(name, response, kwargs, end, labels):
    builder = builder_of(name, chat_template_kwargs=kwargs)
    prompt, text = texts(builder, make_pair(response, response.replace("3.", "4.")))
    assert prompt.endswith(end) and text == labels + builder.tokenizer.convert_ids_to_tokens(builder.end_id)
    assert builder.notes(make_pair(response, response.replace("3.", "4."))) == []


@pytest.mark.parametrize("name", ["deepseek-r1", "double"])
def test_reasoning_that_the_prompt_opens_is_refused_or_closed(name):
    pair = make_pair("It is 3.", "It is 4.")
    with pytest.raises(DataError) as caught:
        builder_of(name).tokens(pair)
    assert (caught.value.kind, caught.value.record, caught.value.field) == ("reasoning left open", 7, "chosen")
    assert "reasoning: close" in str(caught.value) and "generation prompt opens <think>" in str(caught.value)
    builder = builder_of(name, reasoning="close")
    prompt, text = texts(builder, pair)
    assert prompt.endswith("<think>\n") and text.startswith("\n</think>\n\nIt is 3.")
    assert builder.notes(pair) == [CLOSED] and builder.notes(make_pair()) == []
    # One side with reasoning: only the other is closed.
    assert texts(builder, make_pair(RESPONSE, "It is 4."))[1].startswith(f"{WHY}\n</think>")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("qwen-3", THINKS),
        ("qwen-3-thinking", f"{WHY}\n</think>\n\nIt is 3."),
        ("deepseek-r1", f"{WHY}\n</think>\n\nIt is 3."),
        ("deepseek-r1-old", THINKS),
        ("glm", f"\n<think>{WHY}</think>\nIt is 3."),
        ("gpt-oss", f"<|channel|>analysis<|message|>{WHY}<|end|><|start|>assistant<|channel|>final<|message|>It is 3."),
    ],
)
def test_the_reasoning_field_is_written_where_the_template_has_a_place(name, labels):
    builder = builder_of(name)
    pair = make_pair("It is 3.", "It is 4.", chosen_fields=f'{{"reasoning_content": "{WHY}"}}',
                     rejected_fields='{"reasoning_content": "No."}')  # fmt: skip
    assert texts(builder, pair)[1] == labels + builder.tokenizer.convert_ids_to_tokens(builder.end_id)


@pytest.mark.parametrize("name", ["qwen-2.5", "llama-2"])
def test_the_reasoning_field_is_refused_where_it_has_none(name):
    fields = '{"reasoning_content": "No."}'
    with pytest.raises(DataError, match="record 7, field 'rejected': no place for reasoning_content"):
        builder_of(name).tokens(make_pair("It is 3.", "It is 4.", rejected_fields=fields))


def test_reasoning_behind_a_closed_block_is_refused_with_the_switch():
    builder = builder_of("qwen-3", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(DataError, match="reasoning behind its end: .*ends in </think>.*enable_thinking: true"):
        builder.tokens(make_pair())


def test_earlier_turns_are_trained_as_inference_sees_them():
    builder = builder_of("qwen-3")
    turns = (Message("user", "2 + 2?"), Message("assistant", "<think>\nEasy.\n</think>\n\nIt is 4!"))
    text = builder.tokenizer.decode(builder.tokens(make_pair(turns=turns)).prompts[0])
    assert "It is 4!" in text and "Easy." not in text and text.count("<think>") == 0


ALTERING = FAMILIES["zephyr"].template.replace("m.content", "m.content | replace('3', 'three')")


def test_an_answer_that_the_template_alters_is_refused_with_what_it_leaves_out():
    tokenizer = chat.family_tokenizer(Family(ALTERING, "bytes", ()))
    with pytest.raises(DataError, match="field 'chosen': altered by the chat template: .*'It is 3.'.*Remedy"):
        PromptBuilder(tokenizer, ["no_object"]).tokens(
            Pair(7, (Message("user", "1 + 2?"),), "It is 3.", "It is 4.", source="file.json")
        )
    # Half of the reasoning left out is an alteration too.
    half = FAMILIES["deepseek-r1"].template.replace("text.split('</think>')[-1]", "'!' + text.split('</think>')[-1]")
    tokenizer = chat.family_tokenizer(Family(half, "bytes", FAMILIES["deepseek-r1"].special, ("<think>", "</think>")))
    with pytest.raises(DataError, match="altered by the chat template: reasoning"):
        PromptBuilder(tokenizer, DIMENSIONS).tokens(make_pair())


def test_the_choices_are_named():
    with pytest.raises(ValueError, match="reasoning must be one of refuse, close, got 'open'"):
        builder_of("qwen-3", reasoning="open")
    with pytest.raises(ValueError, match="no variable 'enable_thinkin'"):
        builder_of("qwen-3", chat_template_kwargs={"enable_thinkin": False})

"""What a record holds beside prompt and responses has its place in the template or is refused by name; texts that look
special are text; the clock stands still."""

import datetime
import json

import numpy as np
import pytest
import tokenizers_for_tests as chat
from chat_templates import FAMILIES, Family
from tokenizers import AddedToken, normalizers

from amopo_fast.data.pairs import Message, Pair
from amopo_fast.errors import DataError
from amopo_fast.prompts import template_probe
from amopo_fast.prompts.builder import CONTROL_TEXT, PromptBuilder
from amopo_fast.prompts.model_limits import check_pairs, check_vocabulary
from amopo_fast.prompts.template import frozen_clock

DIMENSIONS = ("no_object", "helpfulness")
DATE = "2025-02-03"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time of a <|im_end|> place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"place": "Oslo"}}}
ASKED = (
    Message("user", "Time in Oslo?"),
    Message("assistant", "", json.dumps({"tool_calls": [CALL]})),
    Message("tool", "12:30", json.dumps({"name": "get_time"})),
)  # fmt: skip


QUESTION = (Message("user", "Who?"),)


def make_pair(messages=QUESTION, chosen="Ada.", rejected="Bob.", **fields):
    return Pair(7, tuple(messages), chosen, rejected, {"helpfulness": 4.0}, {}, "file.json", **fields)


def builder_of(name, **options):
    options = {"template_date": DATE, "max_length": 100_000, **options}
    return PromptBuilder(chat.family_tokenizer(FAMILIES[name]), DIMENSIONS, **options)


SYSTEM = (Message("system", "Be brief!"), Message("user", "Who?"))


@pytest.mark.parametrize(
    "name",
    ["llama-2", "llama-3", "mistral-3", "mistral-7", "zephyr", "phi-3", "qwen-2.5", "qwen-3", "gpt-oss", "smollm-3"],
)
def test_a_system_message_is_used_where_it_has_a_place(name):
    builder = builder_of(name)
    prompt = builder.tokenizer.decode(builder.tokens(make_pair(SYSTEM)).prompts[1])
    assert prompt.count("Be brief!") == 1


def test_a_system_message_is_refused_by_name_where_it_has_none():
    for name, message in (("gemma", "no system role"), ("mistral-1", "only user and assistant")):
        with pytest.raises(DataError, match=f"refused by the chat template: {message}"):
            builder_of(name).tokens(make_pair(SYSTEM))
    dropping = FAMILIES["zephyr"].template.replace("in messages %}", "in messages if m.role != 'system' %}")
    builder = PromptBuilder(chat.family_tokenizer(Family(dropping, "bytes", ())), DIMENSIONS)
    with pytest.raises(DataError, match=r"field 'prompt\[0\]': no place in the chat template: .*the system's message"):
        builder.tokens(make_pair(SYSTEM))


@pytest.mark.parametrize("name", ["llama-3", "mistral-3", "qwen-2.5", "qwen-3", "gpt-oss"])
def test_tools_and_their_calls_are_used_where_they_have_a_place(name):
    builder = builder_of(name)
    calls = json.dumps({"tool_calls": [CALL]})
    pair = make_pair(ASKED, tools=json.dumps([TOOL]))
    prompt = builder.tokenizer.decode(builder.tokens(pair).prompts[1])
    assert "The time of a <|im_end|> place." in prompt and "12:30" in prompt and "4 out of 5" in prompt
    assert prompt.index("4 out of 5") < prompt.index("Time in Oslo?") < prompt.rindex("12:30")
    assert "Oslo" in prompt[prompt.index("Time in Oslo?") + 13 :]
    # The call as an answer.
    tokens = builder.tokens(make_pair(ASKED[:1], "", "I do not know.", chosen_fields=calls, tools=json.dumps([TOOL])))
    assert "get_time" in builder.tokenizer.decode(tokens.chosen)


def test_tools_and_calls_are_refused_by_name_where_they_have_none():
    builder = builder_of("zephyr")
    with pytest.raises(DataError, match="record 7, field 'tools': no place in the chat template"):
        builder.tokens(make_pair(tools=json.dumps([TOOL])))
    with pytest.raises(DataError, match=r"prompt\[1\].tool_calls': no place in the chat template"):
        builder.tokens(make_pair(ASKED))
    with pytest.raises(DataError, match="field 'chosen': no place for tool_calls"):
        builder.tokens(make_pair(chosen="", chosen_fields=json.dumps({"tool_calls": [CALL]})))


def test_a_records_own_variables_override_those_of_the_run():
    builder = builder_of("qwen-3", chat_template_kwargs={"enable_thinking": False})
    ends = [
        builder.tokenizer.decode(builder.tokens(make_pair(chat_template_kwargs=own)).prompts[0])[-12:]
        for own in ("", '{"enable_thinking": true}')
    ]
    assert ends == ["\n\n</think>\n\n", "t>assistant\n"] or ends[1].endswith("assistant\n")
    with pytest.raises(DataError, match="chat_template_kwargs': no place .*no variable 'thinking'"):
        builder.tokens(make_pair(chat_template_kwargs='{"thinking": true}'))


# ----- texts that look special -----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", ["dimension_first", "dimension_last"])
def test_texts_that_look_special_are_text_in_their_places(name, order):
    """Against the same pair with a harmless word in the place of each token: only that word's ids differ."""
    builder = builder_of(name, order=order, reasoning="close")
    tokenizer, control = builder.tokenizer, list(builder.answers.control.values())
    spelt = f"Why {control[-1]} and {builder.answers.end_text or control[-1]}s or <filename> {control[1]}?"
    pair = make_pair([Message("user", spelt)], f"As {spelt} So.", f"No {spelt} So.")
    tokens = builder.tokens(pair)
    plain = spelt
    for text in control:
        plain = plain.replace(text, "judge")
    other = builder.tokens(make_pair([Message("user", plain)], f"As {plain} So.", f"No {plain} So."))
    own = set(builder.answers.control) - {tokenizer.unk_token_id}
    for marked, reference in zip((*tokens.prompts, tokens.chosen), (*other.prompts, other.chosen), strict=True):
        found, expected = ([index for index in ids.tolist() if index in own] for ids in (marked, reference))
        assert found == expected  # the template's own tokens, and no other
    if FAMILIES[name].kind not in ("wordpiece", "unigram"):  # these lose letters
        decoded = tokenizer.decode(tokens.chosen, clean_up_tokenization_spaces=False)
        assert spelt in decoded and spelt in tokenizer.decode(tokens.prompts[1], clean_up_tokenization_spaces=False)
    assert builder.notes(pair)[0] == CONTROL_TEXT


def test_such_a_text_has_the_ids_of_one_piece():
    """With the special tokens unknown, the tokenizer itself encodes the text between the template's marks."""
    builder = builder_of("llama-2")
    text = "So </s> it ends <s>here"
    tokens = builder.tokens(make_pair(chosen=text))
    bare = chat.family_tokenizer(FAMILIES["llama-2"])
    renamed = json.loads(bare.backend_tokenizer.to_str())
    renamed["added_tokens"] = []
    renamed["model"]["vocab"] = {f"{key}!" if key in ("<s>", "</s>") else key: index
                                 for key, index in renamed["model"]["vocab"].items()}  # fmt: skip
    whole = type(bare.backend_tokenizer).from_str(json.dumps(renamed))
    expected = whole.encode(f"[/INST] {text} ", add_special_tokens=False).ids
    assert expected[-len(tokens.chosen) + 1 :] == tokens.chosen[:-1].tolist() and tokens.chosen[-1] == builder.end_id


def test_a_wording_that_looks_special_is_text_too(tmp_path):
    path = tmp_path / "wording.yaml"
    path.write_text("score: 'Rate </s> {score}'\nno_object: 'All: {dimensions}'\n")
    builder = builder_of("llama-2", template=path)
    ids = builder.tokens(make_pair()).prompts[1].tolist()
    assert builder.end_id not in ids and "Rate </s> 4" in builder.tokenizer.decode(ids)


def test_a_tokenizer_that_cannot_leave_a_token_alone_refuses_the_record():
    builder = builder_of("unigram")
    unknown = json.loads(builder.tokenizer.backend_tokenizer.to_str())["model"]["unk_id"]
    assert builder.tokens(make_pair(chosen="So </s>")).chosen[-1] == builder.end_id
    # A token with two ids: the twin can have but one of them under the new name.
    twice = builder_of("unigram")
    twice.encoder._control[unknown + 50] = "</s>"
    results = list(twice.iter_tokens([make_pair(), make_pair(chosen="So </s>"), make_pair()]))
    assert [isinstance(result, DataError) for result in results] == [False, True, False]
    assert results[1].kind == "special token in text" and "'</s>' by no other name" in results[1].found


# ----- the clock -----


@pytest.mark.parametrize("name", ["llama-3", "smollm-3", "gpt-oss"])
def test_the_clock_stands_at_the_date_of_the_run(name):
    builder = builder_of(name)
    shown = {"llama-3": "03 Feb 2025", "smollm-3": "03 February 2025", "gpt-oss": "2025-02-03"}[name]
    assert shown in builder.tokenizer.decode(builder.tokens(make_pair()).prompts[0])
    assert builder.template_date == DATE
    assert builder_of(name, template_date=None).template_date == datetime.date.today().isoformat()


def test_a_template_without_a_clock_has_no_date():
    assert builder_of("qwen-2.5").template_date is None


@pytest.mark.parametrize("format", ["%d %b %Y", "%A, %-d. %B '%y", "100%% at %H:%M:%S (%j)", "%%d %d", "", "%I %p"])
def test_the_frozen_clock_formats_as_strftime(format):
    import jinja2.sandbox

    day = datetime.datetime(2025, 2, 3)
    source = frozen_clock(DATE) + "{%- if strftime_now is defined %}{{ strftime_now(format) }}{% endif %}"
    text = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True).from_string(source).render(format=format)
    assert text == day.strftime(format)


# ----- templates that loop or explode, or are none -----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10 ** 10 }}", "512 MiB.*loops or explodes"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}aaaa{% endfor %}{% endfor %}", "1048576 characters"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "MiB|characters",
        ),
        ("{% for m in messages %}", "no valid Jinja"),
        (chat.CHATML + "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "2 s of computing"),
        ("{{ messages[0].content }}", "leaves out the answer"),
        ("{{ 3 + 'a' }}", "TypeError"),
        ("{{ messages[5].content.x }}", "refuses"),
        ("{{ 2.0 ** 5000 }}", "OverflowError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template, message, monkeypatch):
    monkeypatch.setattr(template_probe, "CPU_SECONDS", 2)
    tokenizer = chat.make_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        PromptBuilder(tokenizer, DIMENSIONS)


def test_a_template_that_explodes_with_the_data_is_stopped_at_its_record():
    growing = chat.CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] * (message['content'] | length) }}"
    )
    growing = "{% if messages[0]['content'] | length < 200 %}" + chat.CHATML + "{% else %}" + growing + "{% endif %}"
    builder = PromptBuilder(chat.make_tokenizer(growing), DIMENSIONS)
    with pytest.raises(DataError, match="record 7.*refused by the chat template: it makes [0-9]+ characters"):
        builder.tokens(make_pair([Message("user", "a" * 3000)]))


# ----- the end token -----


def test_an_end_token_that_is_not_declared_special_is_the_end_token():
    family = FAMILIES["qwen-2.5"]
    tokenizer = chat.family_tokenizer(Family(family.template, "bytes", (), family.special + family.plain))
    assert not any(token.special for token in tokenizer.added_tokens_decoder.values() if token.content == "<|im_end|>")
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    assert tokenizer.convert_ids_to_tokens(builder.end_id) == "<|im_end|>"
    tokens = builder.tokens(make_pair(chosen="So <|im_end|> it ends"))
    assert np.count_nonzero(tokens.chosen == builder.end_id) == 1 and tokens.chosen[-1] == builder.end_id


def test_an_end_token_that_takes_the_blanks_before_it_is_encoded_in_its_place():
    tokenizer = chat.family_tokenizer(FAMILIES["llama-2"])
    tokenizer.add_tokens([AddedToken("</s>", special=True, lstrip=True, normalized=False)], special_tokens=True)
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    whole = tokenizer("[/INST] Ada. </s>", add_special_tokens=False)["input_ids"]
    assert whole[-len(builder.tokens(make_pair()).chosen) :] == builder.tokens(make_pair()).chosen.tolist()


# ----- ids of a response that has no place of its own -----


def test_a_piece_across_the_border_is_left_to_the_prompt():
    """'assistant\\n' and '\\nSo' would share a line end's piece; the prompt keeps its own."""
    builder = builder_of("qwen-2.5")
    tokens = builder.tokens(make_pair(chosen="\nSo"))
    prompt, chosen = tokens.prompts[0].tolist(), tokens.chosen.tolist()
    whole = builder.tokenizer("assistant\n\nSo", add_special_tokens=False)["input_ids"]
    assert builder.tokenizer.decode(prompt[-1:] + chosen) == "\n\nSo<|im_end|>" and prompt[-1] not in whole


def test_a_response_without_ids_that_read_as_its_text_is_refused():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '=' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    tokenizer = chat.family_tokenizer(Family(template, "unprefixed", ()))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("=Ada", "☃"), normalizers.Replace(" ", "▁")]
    )
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    assert builder.tokens(make_pair(chosen="Bea.")) and builder.end_id == tokenizer.eos_token_id
    with pytest.raises(DataError, match="field 'chosen': no tokens in its place"):
        builder.tokens(make_pair(chosen="Ada."))


# ----- the model's limits -----


def test_a_model_that_is_too_small_is_refused_with_the_numbers():
    builder = builder_of("qwen-2.5")
    tokenizer = builder.tokenizer
    highest = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, highest + 1)
    with pytest.raises(ValueError, match=rf"ids up to {highest} .*only {highest} rows.*resized to {highest + 1}"):
        check_vocabulary(tokenizer, highest)
    pairs = [builder.tokens(make_pair()), builder.tokens(make_pair(chosen="Ada " * 40))]
    longest = max(map(len, pairs[1].prompts)) + len(pairs[1].chosen)
    used = max(int(ids.max()) for pair in pairs for ids in (*pair.prompts, pair.chosen, pair.rejected))
    check_pairs(pairs, vocabulary=used + 1, positions=longest)
    check_pairs(pairs, vocabulary=used + 1, positions=None)
    with pytest.raises(DataError, match=f"record 7: .*{longest} tokens, .*{longest - 1} positions.*max_length"):
        check_pairs(pairs, vocabulary=used + 1, positions=longest - 1)
    with pytest.raises(DataError, match=f"id {used}, .*{used} rows"):
        check_pairs(pairs, vocabulary=used, positions=longest)

"""Prompts and their tokens: the exact split, special tokens once, the wording, truncation."""

import re

import numpy as np
import pytest
import tokenizers_for_tests as chat
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.data.pairs import Message, Pair
from amopo_fast.data.sources.candidate import Dropped
from amopo_fast.errors import DataError
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.encoding import Encoder
from amopo_fast.prompts.wording import Wording

DIMENSIONS = ("no_object", "helpfulness", "instruction_following")
CASES = {
    "chatml": (chat.CHATML, {}),
    "no template": (None, {}),
    "no template, no marks": (None, {"marks": False}),
    "no template, begin token": (None, {"marks": False, "bos": True}),
    "thinking": (chat.THINKING, {}),
    "brackets": (chat.BRACKETS, {"bos": True, "marks": False}),
    "plain": (chat.PLAIN, {}),
}


def make_pair(prompt="When was it founded?", chosen="In 1840.", rejected="I do not know.", record=7, **scores):
    messages = prompt if isinstance(prompt, tuple) else (Message("user", prompt),)
    scores = {"helpfulness": 4.0, "instruction_following": 2.5, **scores}
    low = {name: 1.0 for name in scores}
    return Pair(record, messages, chosen, rejected, scores, low, "file.json")


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnop"))
    return " ".join("".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(count))


@pytest.mark.parametrize("case", CASES)
def test_prompt_and_response_are_the_templates_conversation_split_at_the_response(case):
    template, options = CASES[case]
    tokenizer = chat.make_tokenizer(template, **options)
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    pair = make_pair(chosen="  In 1840,\nor so. ", rejected="No.")
    tokens = builder.tokens(pair)
    assert not tokens.truncated and tokens.record == 7
    end = tokenizer.convert_ids_to_tokens(builder.end_id)
    used = template or ("{{ bos_token }}" if options.get("bos") else "") + chat.CHATML
    for name, prompt in zip(DIMENSIONS, tokens.prompts, strict=True):
        for text, response in ((pair.chosen, tokens.chosen), (pair.rejected, tokens.rejected)):
            messages = [*builder.messages(pair, name), {"role": "assistant", "content": text}]
            full = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=used)
            got = tokenizer.decode(np.concatenate([prompt, response]))
            assert got.endswith(end) and response.dtype == np.int64 and prompt.dtype == np.int64
            body = got[: -len(end)]
            assert full.startswith(body)
            # What is left out is the template's end of turn: a mark, a newline, or both.
            assert full[len(body) :] in ("<|im_end|>\n", end, "\n")
            assert np.count_nonzero(response == builder.end_id) == 1 and response[-1] == builder.end_id
            assert text.strip() in tokenizer.decode(response)
            assert text.strip() not in tokenizer.decode(prompt)
    if options.get("bos"):
        assert [np.count_nonzero(prompt == tokenizer.bos_token_id) for prompt in tokens.prompts] == [1, 1, 1]
        assert tokenizer.bos_token_id not in tokens.chosen


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_each_text_by_itself(case):
    template, options = CASES[case]
    tokenizer = chat.make_tokenizer(template, **options)
    tokens = PromptBuilder(tokenizer, DIMENSIONS).tokens(make_pair())
    for ids in (*tokens.prompts, tokens.chosen):
        again = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(ids, again)


def test_an_inserted_thinking_block_belongs_to_the_labels_as_the_generation_prompt_does_not_hold_it():
    tokenizer = chat.make_tokenizer(chat.THINKING)
    tokens = PromptBuilder(tokenizer, DIMENSIONS).tokens(make_pair(chosen=" think", rejected="no"))
    assert tokenizer.decode(tokens.chosen) == "<think>\n\n</think>\n\n think<|im_end|>"
    assert tokenizer.decode(tokens.rejected) == "<think>\n\n</think>\n\nno<|im_end|>"
    assert all(tokenizer.decode(prompt).endswith("assistant\n") for prompt in tokens.prompts)


def test_a_template_that_rewrites_an_answered_conversation_keeps_the_prompt_that_generation_sees():
    tokenizer = chat.make_tokenizer(chat.REWRITING)
    builder = PromptBuilder(tokenizer, DIMENSIONS)
    tokens = builder.tokens(make_pair())
    for name, prompt in zip(DIMENSIONS, tokens.prompts, strict=True):
        seen = tokenizer.apply_chat_template(
            builder.messages(make_pair(), name), tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(prompt) == seen and "(answered)" not in seen
    assert tokenizer.decode(tokens.chosen) == "In 1840.<|im_end|>"


@pytest.mark.parametrize("response", ["end", "<", "assistant", "im_end", "I", ">\n", "a"])
def test_responses_that_look_like_the_template(response):
    tokenizer = chat.make_tokenizer()
    tokens = PromptBuilder(tokenizer, DIMENSIONS).tokens(make_pair(chosen=response, rejected="no"))
    assert tokenizer.decode(tokens.chosen) == response + "<|im_end|>"


def test_eos_ends_the_response_where_the_template_does_not_and_without_one_it_is_refused():
    tokenizer = chat.make_tokenizer(chat.PLAIN)
    assert PromptBuilder(tokenizer, DIMENSIONS).end_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        PromptBuilder(chat.make_tokenizer(chat.PLAIN, eos=False), DIMENSIONS)


def test_instructions_name_the_chosen_sides_score_and_the_upper_end_of_the_range():
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, score_range=(1, 10))
    pair = make_pair()
    assert "4 out of 10" in builder.instruction(pair, "helpfulness")
    following = builder.instruction(pair, "instruction_following")
    assert "2.5 out of 10 for instruction following" in following
    assert "helpfulness and instruction following" in builder.instruction(pair, "no_object")
    assert not re.search(r"\d", builder.instruction(pair, "no_object"))
    assert builder.messages(pair, "no_object")[-1]["content"].endswith("\n\nWhen was it founded?")


def test_no_object_alone_leaves_the_prompt_as_it_is():
    builder = PromptBuilder(chat.make_tokenizer(), ["no_object"])
    assert builder.messages(make_pair(), "no_object") == [{"role": "user", "content": "When was it founded?"}]


def test_dimension_last_shares_the_users_text_as_a_prefix():
    def shared(order):
        prompts = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, order=order).tokens(make_pair(words(60))).prompts
        return int(np.argmin(np.append(np.equal(prompts[1][:40], prompts[2][:40]), False)))

    assert shared("dimension_last") == 40 > shared("dimension_first")
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, order="dimension_last")
    content = builder.messages(make_pair(), "helpfulness")[-1]["content"]
    assert content.startswith("When was it founded?\n\nWrite")


def test_only_the_last_user_message_gets_the_instruction():
    messages = (
        Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "When?"),
    )  # fmt: skip
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS)
    made = builder.messages(make_pair(messages), "helpfulness")
    assert made[:3] == [message.as_dict() for message in messages[:3]]
    assert made[3]["content"].endswith("\n\nWhen?") and "4 out of 5" in made[3]["content"]


def test_a_missing_chosen_score_makes_the_dimension_absent():
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS)
    pair = Pair(0, (Message("user", "When?"),), "Now.", "Never.", {"helpfulness": 3.0}, {"instruction_following": 1.0})
    tokens = builder.tokens(pair)
    assert [prompt is None for prompt in tokens.prompts] == [False, False, True]
    with pytest.raises(ValueError, match="absent"):
        builder.messages(pair, "instruction_following")


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_text_is_never_interpreted(text):
    text += " {score} {0.__class__} {{ raise_exception('x') }} {% if %} %s"
    builder = _SHARED
    pair = make_pair(text, chosen=text)
    assert builder.messages(pair, "helpfulness")[-1]["content"].endswith("\n\n" + text)
    tokens = builder.tokens(pair)
    assert builder.tokenizer.decode(tokens.chosen) == text + "<|im_end|>"


_SHARED = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=100_000)


def test_a_conversation_that_the_template_refuses_names_the_record_and_its_words():
    builder = PromptBuilder(chat.make_tokenizer(chat.BRACKETS, bos=True, marks=False), DIMENSIONS)
    with pytest.raises(DataError, match="record 7.*refused by the chat template: no system messages here"):
        builder.tokens(make_pair((Message("system", "Be brief."), Message("user", "When?"))))


@pytest.mark.parametrize("order", ["dimension_first", "dimension_last"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("prompt_words", "response_words"), [(400, 3), (400, 20), (2, 400), (400, 400)])
def test_truncation_keeps_head_instruction_header_and_end(case, order, prompt_words, response_words):
    template, options = CASES[case]
    tokenizer = chat.make_tokenizer(template, **options)
    builder = PromptBuilder(tokenizer, DIMENSIONS, order=order, max_length=300)
    user, chosen = words(prompt_words, 1), words(response_words, 2)
    pair = make_pair(user, chosen, "No é.")
    tokens = builder.tokens(pair)
    ended = PromptBuilder(tokenizer, DIMENSIONS, order=order, max_length=300, truncated_responses="keep_end")
    ended = ended.tokens(pair)
    whole = PromptBuilder(tokenizer, DIMENSIONS, order=order, max_length=100_000).tokens(pair)
    empty = PromptBuilder(tokenizer, DIMENSIONS, order=order).tokens(make_pair("☃", chosen="a", rejected="b"))
    assert tokens.truncated and not whole.truncated
    kept = set()
    for name, prompt, marker in zip(DIMENSIONS, tokens.prompts, empty.prompts, strict=True):
        text = tokenizer.decode(prompt)
        head, tail = tokenizer.decode(marker).split("☃")
        assert builder.instruction(pair, name) in text
        assert text.startswith(head) and text.endswith(tail)
        kept.add(text[len(head) : len(text) - len(tail)])
    assert len(kept) == 1 and user.startswith(kept.pop().strip())
    longest = max(map(len, tokens.prompts)) + max(len(tokens.chosen), len(tokens.rejected))
    # Not needlessly short either: the cut may lose a few tokens to merges, not more.
    assert 300 - 8 <= longest <= 300
    np.testing.assert_array_equal(tokens.chosen, whole.chosen[: len(tokens.chosen)])
    assert ended.chosen[-1] == builder.end_id and np.count_nonzero(ended.chosen == builder.end_id) == 1
    np.testing.assert_array_equal(ended.chosen[:-1], whole.chosen[: len(ended.chosen) - 1])
    np.testing.assert_array_equal(tokens.rejected, whole.rejected)
    assert len(ended.chosen) == len(tokens.chosen)
    if response_words == 400:  # a cut response is not taught to end, unless that is asked for
        assert builder.end_id not in tokens.chosen
        drops = PromptBuilder(tokenizer, DIMENSIONS, order=order, max_length=300, truncated_responses="drop")
        assert next(drops.iter_tokens([pair])) == Dropped(7, "a response that does not fit max_length=300")
        with pytest.raises(DataError, match="a response that does not fit.*truncated_responses: no_end"):
            drops.tokens(pair)
    if response_words < 100:
        np.testing.assert_array_equal(tokens.chosen, whole.chosen)


@pytest.mark.parametrize("place", ["prompt", "chosen"])
def test_of_a_text_of_megabytes_no_more_is_tokenised_than_what_may_be_kept(monkeypatch, place):
    given = []
    for name in ("encode", "token_ends"):
        real = getattr(Encoder, name)

        def recorded(self, texts, real=real):
            given.extend([texts] if isinstance(texts, str) else texts)
            return real(self, texts)

        monkeypatch.setattr(Encoder, name, recorded)
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=300)
    some = words(2000)  # 11,000 characters
    short, long = (builder.tokens(make_pair(**{place: some * times})) for times in (1, 200))
    assert max(map(len, given)) < 100_000
    for a, b in zip((*short.prompts, short.chosen), (*long.prompts, long.chosen), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pair_at_the_limit_is_left_alone_and_one_token_less_shortens_the_prompt_only():
    tokenizer = chat.make_tokenizer()
    pair = make_pair(words(50), words(20, 3))
    whole = PromptBuilder(tokenizer, DIMENSIONS, max_length=100_000).tokens(pair)
    length = max(map(len, whole.prompts)) + len(whole.chosen)
    assert not PromptBuilder(tokenizer, DIMENSIONS, max_length=length).tokens(pair).truncated
    shorter = PromptBuilder(tokenizer, DIMENSIONS, max_length=length - 1).tokens(pair)
    assert shorter.truncated
    np.testing.assert_array_equal(shorter.chosen, whole.chosen)


def test_old_turns_go_before_the_last_message_is_shortened():
    old, answer, last = words(200, 1), words(30, 2), words(30, 3)
    turns = (Message("user", old), Message("assistant", answer), Message("user", last))
    messages = (Message("system", "Be brief."), *turns)
    tokenizer = chat.make_tokenizer()
    tokens = PromptBuilder(tokenizer, DIMENSIONS, max_length=400).tokens(make_pair(messages))
    text = tokenizer.decode(tokens.prompts[0])
    assert tokens.truncated and "Be brief." in text and last in text
    assert old[:20] not in text and answer[:20] not in text


def test_a_prompt_that_does_not_fit_names_the_record_and_a_length_that_would_do():
    tokenizer = chat.make_tokenizer()
    with pytest.raises(DataError, match=r"record 7.*does not fit.*raise max_length to (\d+)") as caught:
        PromptBuilder(tokenizer, DIMENSIONS, max_length=20).tokens(make_pair(words(30)))
    enough = int(re.search(r"max_length to (\d+)", str(caught.value))[1])
    # At exactly this length every response is one token and its end.
    tokens = PromptBuilder(tokenizer, DIMENSIONS, max_length=enough).tokens(make_pair(words(30), "Yes."))
    assert len(tokens.chosen) == 2
    with pytest.raises(DataError, match="does not fit"):
        PromptBuilder(tokenizer, DIMENSIONS, max_length=enough - 1).tokens(make_pair(words(30)))


def test_sides_that_truncation_makes_equal_are_an_error():
    text = words(300)
    with pytest.raises(DataError, match="identical sides: the same tokens on both sides after truncation"):
        PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=300).tokens(
            make_pair(chosen=text + " a", rejected=text + " b")
        )


def test_many_pairs_equal_single_ones_and_bad_ones_are_skipped_on_request(caplog):
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=250)
    pairs = [make_pair(words(5 + index, index), words(2 + index % 5, 99 + index), "No.", index) for index in range(70)]
    pairs[66] = make_pair(chosen="No.", rejected="No.", record=66)
    with pytest.raises(DataError, match="record 66"):
        builder.tokenize(pairs)
    result, errors = builder.tokenize(pairs, on_bad_record="skip")
    assert [error.record for error in errors] == [66]
    assert [tokens.record for tokens in result] == [*range(66), *range(67, 70)]
    for tokens in result:
        alone = builder.tokens(pairs[tokens.record])
        for left, right in zip((*tokens.prompts, tokens.chosen), (*alone.prompts, alone.chosen), strict=True):
            np.testing.assert_array_equal(left, right)
    shortened = sum(tokens.truncated for tokens in result)
    assert 0 < shortened < 69
    assert f"{shortened} of 69 records were shortened" in caplog.text
    with pytest.raises(DataError, match="no usable record"):
        builder.tokenize(pairs[66:67], on_bad_record="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("score: '{score}'\nno_object: x\nscoer: y", "unknown key.*scoer.*use the keys"),
        ("score: '{score} {user}'\nno_object: x", "field 'score': unknown placeholder: {user}"),
        ("score: 'rate it'\nno_object: x", "missing placeholder"),
        ("score: '{score}'", "field 'no_object': missing field"),
        ("score: 3\nno_object: x", "field 'score': wrong type: int 3"),
        ("- score", "wrong type: list"),
        ("score: [", "invalid YAML"),
        ("score: '{score}'\nno_object: x\ndimensions:\n  a: {label: b}", "field 'dimensions.a.label'"),
        ("", "wrong type: NoneType"),
    ],
)
def test_bad_templates(tmp_path, content, message):
    path = tmp_path / "wording.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"wording\.yaml.*{message}"):
        Wording.load(path)


def test_a_users_template_replaces_the_wording(tmp_path):
    path = tmp_path / "wording.yaml"
    path.write_text("score: '{dimension}={score}/{max} {} { definition'\nno_object: 'All: {dimensions}'\n")
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, template=path)
    assert builder.instruction(make_pair(), "instruction_following") == "instruction following=2.5/5 {} { definition"
    assert builder.instruction(make_pair(), "no_object") == "All: helpfulness and instruction following"
    with pytest.raises(DataError, match="nowhere.yaml: unreadable file"):
        Wording.load(tmp_path / "nowhere.yaml")

"""Conversations as data sets write them: system messages, histories, tools, reasoning, repeated prompts, tables."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amopo_fast.data.pairs import Message, Reading, read_pairs, read_records
from amopo_fast.data.sources.formats import open_source
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError

SCORES = {"helpfulness_chosen": 4, "helpfulness_rejected": 1}
DIMENSIONS = ("no_object", "helpfulness")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Name a river."}
ELBE = {"role": "assistant", "content": "The Elbe."}
NONE = {"role": "assistant", "content": "No."}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "river"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def read_one(tmp_path, record, name="pairs.jsonl", dimensions=DIMENSIONS):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([record]), path)
    elif name.endswith("csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(record))
            writer.writeheader()
            writer.writerow(record)
    else:
        path.write_text(json.dumps(record) + "\n")
    [pair], _ = read_pairs(path, dimensions=dimensions)
    return pair


def spaced(message):
    return {**message, "content": f" {message['content'].replace(' ', '  ')}\n"}


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        ([USER], [spaced(USER)], [USER]),
        ("Name a  river. ", [USER], [{"role": "user", "content": "Name a  river. "}]),
        ("Name a river.", [SYSTEM, USER], [SYSTEM, USER]),
        ([USER], [SYSTEM, spaced(USER)], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([{**USER, "tool_calls": None, "name": None}], [USER], [USER]),
        ([USER], [{**USER, "tool_calls": None}], [USER]),
        ([USER], [USER, NONE, USER], [USER, NONE, USER]),
        ([USER], [SYSTEM, USER, NONE, USER], [SYSTEM, USER, NONE, USER]),
        ([USER], [NONE, USER], [USER, NONE, USER]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
    ],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_a_prompt_that_both_sides_repeat_is_there_once(tmp_path, prompt, before, expected, name):
    record = {"prompt": prompt, "chosen": [*before, ELBE], "rejected": [*before, NONE], **SCORES}
    if name == "pairs.parquet" and isinstance(prompt, list):
        record["prompt"] = [{"tool_calls": None, **message} for message in prompt]
    pair = read_one(tmp_path, record, name)
    assert [message.as_dict() for message in pair.messages] == expected
    assert (pair.chosen, pair.rejected) == ("The Elbe.", "No.")


def test_sides_that_differ_in_blanks_alone_before_their_answers_are_one_conversation(tmp_path):
    record = {"chosen": [USER, ELBE], "rejected": [spaced(USER), NONE], **SCORES}
    assert read_one(tmp_path, record).messages == (Message("user", "Name a river."),)


def test_a_prompt_that_the_sides_do_not_go_on_from_is_refused(tmp_path):
    other = {"role": "user", "content": "Name a hill."}
    record = {"prompt": [USER], "chosen": [other, ELBE], "rejected": [other, NONE], **SCORES}
    with pytest.raises(DataError, match="field 'chosen': different conversations: a prompt that ends with the user's"):
        read_one(tmp_path, record)


PLAIN = {"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "No.", **SCORES}
AMOPO = {
    "prompt": "Name a river.",
    "chosen": {"response": "The Elbe.", "helpfulness": 4},
    "rejected": {"response": "No.", "helpfulness": 1},
}
QUESTION = Message("user", "Name a river.")


@pytest.mark.parametrize("record", [PLAIN, AMOPO], ids=["trl", "amopo"])
@pytest.mark.parametrize(
    ("extra", "before"),
    [
        ({"system": "Be brief."}, [Message("system", "Be brief.")]),
        ({"system": "", "history": [], "tools": None}, []),
        ({"history": [["Hello", "Hi."]]}, [Message("user", "Hello"), Message("assistant", "Hi.")]),
        ({"history": [{"role": "user", "content": "Hello"}, ELBE], "system": "S"},
         [Message("system", "S"), Message("user", "Hello"), Message("assistant", "The Elbe.")]),
        ({"history": '[["Hello", "Hi."]]'}, [Message("user", "Hello"), Message("assistant", "Hi.")]),
    ],
)  # fmt: skip
def test_system_and_history_come_before_the_prompt(tmp_path, record, extra, before):
    assert read_one(tmp_path, {**record, **extra}).messages == (*before, QUESTION)


def test_a_system_message_that_is_there_twice_is_there_once_or_refused(tmp_path):
    record = {**PLAIN, "prompt": [SYSTEM, USER]}
    assert read_one(tmp_path, {**record, "system": "Be brief. "}).messages[0] == Message("system", "Be brief.")
    with pytest.raises(DataError, match="field 'system': two system messages"):
        read_one(tmp_path, {**record, "system": "Be long."})


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_variables_of_a_record_are_kept(tmp_path, as_json):
    tools, kwargs = [TOOL], {"enable_thinking": False}
    extra = {"tools": tools, "chat_template_kwargs": kwargs}
    extra = {key: json.dumps(value) for key, value in extra.items()} if as_json else extra
    pair = read_one(tmp_path, {**PLAIN, **extra})
    assert json.loads(pair.tools) == tools and json.loads(pair.chat_template_kwargs) == kwargs
    assert pair.prompt != read_one(tmp_path, PLAIN).prompt


def test_nulls_that_a_table_adds_are_no_part_of_tools(tmp_path):
    record = {**PLAIN, "tools": [{"type": "function", "function": {"name": "find", "strict": None}, "other": None}]}
    pair = read_one(tmp_path, record, "pairs.parquet")
    assert json.loads(pair.tools) == [{"type": "function", "function": {"name": "find"}}]


def test_calls_and_reasoning_of_messages_are_kept(tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {
        "name": "find", "arguments": '{"what": "river"}'}}]}  # fmt: skip
    result = {"role": "tool", "content": "Elbe", "name": "find"}
    thought = {**ELBE, "reasoning_content": "Rivers."}
    record = {"prompt": [USER, called, result], "chosen": [thought], "rejected": [NONE], "tools": [TOOL], **SCORES}
    pair = read_one(tmp_path, record)
    assert pair.messages[1].as_dict() == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert pair.messages[2].as_dict() == {"role": "tool", "content": "Elbe", "name": "find"}
    assert json.loads(pair.chosen_fields) == {"reasoning_content": "Rivers."} and pair.rejected_fields == ""
    sides = {**AMOPO, "chosen": {**AMOPO["chosen"], "reasoning_content": "Rivers."}}
    assert json.loads(read_one(tmp_path, sides).chosen_fields) == {"reasoning_content": "Rivers."}
    # An answer may be a call alone, and two sides may differ in their calls alone.
    calling = {"prompt": [USER], "chosen": [called], "rejected": [{**called, "tool_calls": [
        {"function": {"name": "find", "arguments": {}}}]}], **SCORES}  # fmt: skip
    pair = read_one(tmp_path, calling)
    assert (pair.chosen, pair.rejected) == ("", "") and json.loads(pair.chosen_fields) == {"tool_calls": [CALL]}


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_other_names_of_reasoning_are_read_too(tmp_path, name):
    pair = read_one(tmp_path, {"prompt": [USER], "chosen": [{**ELBE, name: "R."}], "rejected": [NONE], **SCORES})
    assert json.loads(pair.chosen_fields) == {"reasoning_content": "R."}


def test_the_parts_of_a_message_are_its_text(tmp_path):
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river."}]
    assert read_one(tmp_path, {**PLAIN, "prompt": [{"role": "user", "content": parts}]}).messages == (QUESTION,)
    parts.append({"type": "image", "url": "x"})
    with pytest.raises(DataError, match=r"prompt\[0\].content': wrong type"):
        read_one(tmp_path, {**PLAIN, "prompt": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"system": 3}, "field 'system': wrong type"),
        ({"history": "Hello"}, "field 'history': invalid JSON"),
        ({"history": {"a": 1}}, "field 'history': wrong type"),
        ({"history": [["a", "b", "c"]]}, r"field 'history\[0\]': wrong type"),
        ({"history": [["a", 3]]}, r"field 'history\[0\]\[1\]': wrong type"),
        ({"history": [{"role": "human", "content": "a"}]}, r"field 'history\[0\].role': unknown role"),
        ({"tools": "find"}, "field 'tools': invalid JSON"),
        ({"tools": {"name": "find"}}, "field 'tools': wrong type"),
        ({"tools": ["find"]}, "field 'tools': wrong type"),
        ({"chat_template_kwargs": "[1]"}, "field 'chat_template_kwargs': wrong type"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' is not a variable"),
        ({"images": ["a.png"]}, "field 'images': unsupported field"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, extra, message):
    with pytest.raises(DataError, match=f"record 0.*{message}.*Remedy"):
        read_one(tmp_path, {**PLAIN, **extra})


def test_calls_that_are_none_are_named(tmp_path):
    for calls in ("find", [{"function": {}}], [3], {"name": "find"}):
        answer = {**ELBE, "tool_calls": calls}
        with pytest.raises(DataError, match=r"field 'chosen\[0\].tool_calls(\[0\])?': (wrong type|invalid JSON)"):
            read_one(tmp_path, {"prompt": [USER], "chosen": [answer], "rejected": [NONE], **SCORES})


# ----- tables of text -----


def test_conversations_in_cells_are_json(tmp_path):
    record = {"prompt": json.dumps([SYSTEM, USER]), "chosen": json.dumps([ELBE]), "rejected": json.dumps([NONE]),
              "tools": json.dumps([TOOL]), **SCORES}  # fmt: skip
    pair = read_one(tmp_path, record, "pairs.csv")
    assert pair.messages == (Message("system", "Be brief."), QUESTION) and json.loads(pair.tools) == [TOOL]


def test_conversations_in_cells_that_are_no_json_are_an_error(tmp_path):
    """As pandas writes a list into a table."""
    record = {"prompt": str([USER]), "chosen": "The Elbe.", "rejected": "No.", **SCORES}
    with pytest.raises(DataError, match="record 0, line 2, field 'prompt': invalid JSON: a conversation.*as JSON"):
        read_one(tmp_path, record, "pairs.csv")
    # Text that only begins like a list is text.
    assert read_one(tmp_path, {**record, "prompt": "[1, 2] is a list?"}, "pairs.csv").messages[0].content[0] == "["


def test_not_a_number_is_a_missing_score_where_those_may_be_absent(tmp_path):
    path = tmp_path / "pairs.parquet"
    rows = [{**PLAIN, "correctness_chosen": 3.0, "correctness_rejected": 1.0}, {**PLAIN, "prompt": "b?",
            "correctness_chosen": float("nan"), "correctness_rejected": float("nan")}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    dimensions = (*DIMENSIONS, "correctness")
    pairs, errors, _ = read_records(path, Reading(dimensions, missing_scores="absent"))
    assert errors == [] and sorted(pairs[1].chosen_scores) == ["helpfulness"]
    with pytest.raises(DataError, match="record 1, field 'correctness_chosen': wrong type: nan, not finite"):
        read_pairs(path, dimensions=dimensions)


# ----- formats of other methods -----

TURNS = [
    {"from": "human", "value": "Name a river."},
    {"from": "gpt", "value": "Which?"},
    {"from": "human", "value": "Any."},
]


def test_sharegpt_with_a_preference_is_read(tmp_path):
    record = {
        "system": "Be brief.",
        "conversations": TURNS,
        "chosen": {"from": "gpt", "value": "The Elbe.", "helpfulness": 4},
        "rejected": {"from": "gpt", "value": "No.", "helpfulness": 1},
    }
    pair = read_one(tmp_path, record)
    assert [message.role for message in pair.messages] == ["system", "user", "assistant", "user"]
    assert (pair.chosen, pair.rejected, pair.chosen_scores) == ("The Elbe.", "No.", {"helpfulness": 4})
    del record["chosen"]["helpfulness"]
    assert read_one(tmp_path, {**record, "helpfulness_chosen": 3}).chosen_scores == {"helpfulness": 3}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "single answers with a label .KTO."),
        ({"prompt": [USER], "completion": [ELBE], "label": False}, "single answers with a label .KTO."),
        ({"conversations": TURNS}, "conversations without a preference .ShareGPT."),
        ({"messages": [USER, ELBE]}, "conversations without a preference"),
        ({"instruction": "a", "input": "", "output": "b"}, "single answers .Alpaca."),
        ({"prompt": "a", "completion": "b"}, "single answers"),
    ],
)
def test_formats_of_other_methods_are_named(tmp_path, record, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl: unknown format: records that are {message}.*docs/data.md"):
        open_source(Source.parse(path))

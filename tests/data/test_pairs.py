"""Reading pairs: good files as they are, and every kind of bad record with its place and remedy."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.data.pairs import Message, Pair, Reading, make_pair, read_pairs, read_records
from amopo_fast.data.sources.candidate import Candidate
from amopo_fast.errors import DataError

DIMENSIONS = ("no_object", "helpfulness", "correctness")


def record(index=0, **changes):
    """A good record; changes go by dotted path ("chosen.helpfulness"), DELETE removes what is there."""
    made = {
        "prompt": f"Question {index}?",
        "chosen": {"response": f"Answer {index}.", "helpfulness": 4, "correctness": 5, "length": 12},
        "rejected": {"response": "No.", "helpfulness": 2, "correctness": 5},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = made
        for parent in parents:
            place = place[parent]
        if value is DELETE:
            del place[last]
        else:
            place[last] = value
    return made


DELETE = object()


def write(tmp_path, records, name="pairs.json"):
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records))
    return path


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.ndjson"])
def test_good_records(tmp_path, name):
    path = write(tmp_path, [record(index, prompt=f"A\u2028B {index}\u0085") for index in range(3)], name)
    pairs, errors = read_pairs(path, dimensions=DIMENSIONS)
    assert errors == []
    assert pairs == [
        Pair(
            index,
            (Message("user", f"A\u2028B {index}\u0085"),),
            f"Answer {index}.",
            "No.",
            {"helpfulness": 4.0, "correctness": 5.0},
            {"helpfulness": 2.0, "correctness": 5.0},
            str(path),
        )
        for index in range(3)
    ]


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "pairs.jsonl"
    text = "\n" + json.dumps(record(0)) + "\r\n\n" + json.dumps(record(1))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [pair.record for pair in read_pairs(path, dimensions=DIMENSIONS)[0]] == [0, 1]


BAD = [
    ({"prompt": DELETE}, "prompt", "missing field"),
    ({"prompt": None}, "prompt", "missing field"),
    ({"prompt": 3}, "prompt", "wrong type"),
    ({"prompt": " \n"}, "prompt", "empty text"),
    ({"prompt": []}, "prompt", "empty text"),
    ({"prompt": ["hello"]}, "prompt[0]", "wrong type"),
    ({"prompt": [{"role": "user"}]}, "prompt[0].content", "missing field"),
    ({"prompt": [{"content": "x"}]}, "prompt[0].role", "missing field"),
    ({"prompt": [{"role": ["user"], "content": "x"}]}, "prompt[0].role", "unknown role"),
    ({"prompt": [{"role": role, "content": "x"} for role in ("user", "assistant")]}, "prompt[1].role", "wrong order"),
    ({"prompt": "half \ud83d"}, "prompt", "invalid text"),
    ({"chosen": DELETE}, "chosen.response", "missing field"),
    ({"chosen": "text"}, "chosen", "wrong type"),
    ({"rejected": None}, "rejected", "wrong type"),
    ({"chosen.response": DELETE}, "chosen.response", "missing field"),
    ({"chosen.response": ""}, "chosen.response", "empty text"),
    ({"rejected.response": "\t"}, "rejected.response", "empty text"),
    ({"rejected.response": {"text": "x"}}, "rejected.response", "wrong type"),
    ({"rejected.response": " Answer 2.\n"}, "rejected.response", "identical sides"),
    ({"chosen.helpfulness": DELETE}, "chosen.helpfulness", "missing field"),
    ({"rejected.correctness": None}, "rejected.correctness", "missing field"),
    ({"chosen.helpfulness": "4"}, "chosen.helpfulness", "wrong type"),
    ({"chosen.helpfulness": True}, "chosen.helpfulness", "wrong type"),
    ({"chosen.helpfulness": float("nan")}, "chosen.helpfulness", "wrong type"),
    ({"rejected.helpfulness": float("inf")}, "rejected.helpfulness", "wrong type"),
    ({"rejected.helpfulness": [4]}, "rejected.helpfulness", "wrong type"),
    ({"chosen.correctness": 5.01}, "chosen.correctness", "score out of range"),
    ({"chosen.correctness": -1}, "chosen.correctness", "score out of range"),
    ({"chosen.correctness": 10**400}, "chosen.correctness", "score out of range"),
]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
@pytest.mark.parametrize(("changes", "field", "kind"), BAD)
def test_bad_records_are_named_and_skipped_on_request(tmp_path, name, changes, field, kind):
    records = [record(0), record(1), record(2, **changes), record(3)]
    path = tmp_path / name
    text = json.dumps(records) if name == "pairs.json" else "\n\n".join(json.dumps(item) for item in records)
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_pairs(path, dimensions=DIMENSIONS)
    error = caught.value
    assert (error.kind, error.record, error.field, error.source) == (kind, 2, field, str(path))
    line = "" if name == "pairs.json" else ", line 5"
    assert str(error).startswith(f"{path}, record 2{line}, field '{field}': {kind}: ")
    assert error.found in str(error) and f"Remedy: {error.remedy}." in str(error) and len(error.remedy) > 10
    assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path))
    pairs, errors = read_pairs(path, dimensions=DIMENSIONS, on_bad_record="skip")
    assert [pair.record for pair in pairs] == [0, 1, 3]
    assert [str(item) for item in errors] == [str(error)]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("value", [3, None, "text", ["a"]])
def test_a_record_that_is_no_object(tmp_path, value):
    path = write(tmp_path, [record(0), value])
    with pytest.raises(DataError, match="record 1: wrong type: .*keys prompt, chosen and rejected"):
        read_pairs(path, dimensions=DIMENSIONS)


WHOLE = [
    ("pairs.json", b"", "empty file"),
    ("pairs.jsonl", b" \n\n", "empty file"),
    ("pairs.json", b"[]", "empty file"),
    ("pairs.json", b'{"data": []}', "no list of records"),
    ("pairs.json", b'{"prompt": "x"}\n{"prompt": "y"}', "no list of records"),
    ("pairs.json", b'"text"', "no list of records"),
    ("pairs.json", json.dumps([record()]).encode()[:-30], "truncated file"),
    ("pairs.json", b'[{"prompt": "abc', "truncated file"),
    ("pairs.json", b'[\n{"prompt" "abc"}]', "line 2: invalid JSON"),
    ("pairs.json", b'[{"prompt": "a\nb"}]', "invalid JSON"),
    ("pairs.json", b"[" * 100_000, "invalid JSON: values nested too deep"),
    ("pairs.json", b"[" + b"1" * 5000 + b"]", "invalid JSON"),
    ("pairs.json", b'[\n"caf\xe9"]', "line 2: not UTF-8: byte 0xe9 at offset 6"),
    ("pairs.txt", b"[]", "unknown file type"),
]


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
@pytest.mark.parametrize(("name", "content", "message"), WHOLE)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message, on_bad_record):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}.*{message}.*Remedy: "):
        read_pairs(path, dimensions=DIMENSIONS, on_bad_record=on_bad_record)


def test_a_path_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "nowhere.json"):
        with pytest.raises(DataError, match=f"{name}: unreadable file"):
            read_pairs(tmp_path / name, dimensions=DIMENSIONS)


def test_bad_lines_of_a_jsonl_file_cost_themselves_only(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(record(index)) for index in range(4)]
    lines[1] = lines[1].replace(":", "", 1)
    path.write_text("\n".join(lines)[:-20])
    pairs, errors = read_pairs(path, dimensions=DIMENSIONS, on_bad_record="skip")
    assert [pair.record for pair in pairs] == [0, 2]
    assert [(error.kind, error.record, error.line) for error in errors] == [
        ("invalid JSON", 1, 2),
        ("truncated file", 3, 4),
    ]


def test_a_list_in_a_jsonl_file_is_explained(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps([record()], indent=1))
    with pytest.raises(DataError, match="begins with a list. Remedy: name the file .json"):
        read_pairs(path, dimensions=DIMENSIONS, on_bad_record="skip")


@pytest.mark.parametrize("missing_scores", ["error", "absent"])
def test_a_dimension_that_no_record_has_is_named_with_those_that_are_there(tmp_path, missing_scores):
    path = write(tmp_path, [record(0), record(1)])
    with pytest.raises(DataError, match="'helpfullness'; scores found: correctness, helpfulness, length.*Remedy"):
        read_pairs(path, dimensions=["no_object", "helpfullness"], missing_scores=missing_scores, on_bad_record="skip")


def test_missing_scores_are_absent_on_request(tmp_path):
    records = [record(0), record(1, **{"chosen.helpfulness": None}), record(2, **{"rejected.correctness": DELETE})]
    pairs, _ = read_pairs(write(tmp_path, records), dimensions=DIMENSIONS, missing_scores="absent")
    assert [sorted(pair.chosen_scores) for pair in pairs] == [
        ["correctness", "helpfulness"], ["correctness"], ["correctness", "helpfulness"],
    ]  # fmt: skip
    assert sorted(pairs[2].rejected_scores) == ["helpfulness"]


def test_a_pair_without_any_dimension_is_bad(tmp_path):
    records = [record(0), record(1, **{"chosen.helpfulness": None})]
    with pytest.raises(DataError, match="record 1.*no score for any of helpfulness"):
        read_pairs(write(tmp_path, records), dimensions=["helpfulness"], missing_scores="absent")


def test_no_object_needs_no_scores(tmp_path):
    records = [{"prompt": "a?", "chosen": {"response": "b"}, "rejected": {"response": "c"}}]
    pairs, _ = read_pairs(write(tmp_path, records), dimensions=["no_object"])
    assert pairs[0].chosen_scores == {}


def test_a_file_without_a_good_record_is_an_error_even_when_skipping(tmp_path):
    path = write(tmp_path, [record(0, prompt=""), record(1, prompt="")])
    with pytest.raises(DataError, match="no usable record: all 2 records are bad, the first: .*record 0"):
        read_pairs(path, dimensions=DIMENSIONS, on_bad_record="skip")
    assert len(read_records(path, Reading(DIMENSIONS)).errors) == 2


def test_conversations(tmp_path):
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]
    prompt += [{"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]
    pairs, _ = read_pairs(write(tmp_path, [record(0, prompt=prompt)]), dimensions=DIMENSIONS)
    assert [message.as_dict() for message in pairs[0].messages] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": []}, "dimensions"),
        ({"dimensions": "helpfulness"}, "dimensions"),
        ({"dimensions": ["a", "a"]}, "differ"),
        ({"dimensions": ["a", " "]}, "non-empty"),
        ({"score_range": (5, 0)}, "low to high"),
        ({"score_range": (0, float("inf"))}, "finite"),
        ({"on_bad_record": "ignore"}, "on_bad_record"),
        ({"missing_scores": "zero"}, "missing_scores"),
    ],
)
def test_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path, [record()]), **{"dimensions": DIMENSIONS, **arguments})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "response", "helpfulness"]), inner, max_size=4),
    max_leaves=12,
)


@given(prompt=JSON, chosen=JSON, rejected=JSON, scores=st.lists(JSON, min_size=4, max_size=4))
@settings(max_examples=300, deadline=None)
def test_whatever_a_record_holds_the_answer_is_a_pair_or_a_data_error(prompt, chosen, rejected, scores):
    names = DIMENSIONS[1:]
    candidate = Candidate(
        5,
        prompt,
        chosen,
        rejected,
        dict(zip(names, scores[:2], strict=True)),
        dict(zip(names, scores[2:], strict=True)),
    )
    try:
        pair = make_pair(candidate, dimensions=DIMENSIONS, missing_scores="absent", source="fuzz")
    except DataError as error:
        assert error.record == 5 and error.field and error.found and error.remedy
    else:
        assert pair.chosen.strip() != pair.rejected.strip()
        assert all(0 <= score <= 5 for score in (*pair.chosen_scores.values(), *pair.rejected_scores.values()))

"""Broken data files: each ends with its name, the place and a remedy, and none with a traceback."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amopo_fast.cli import main


def record(**changes):
    made = {
        "prompt": "Where?",
        "chosen": {"response": "Here.", "helpfulness": 5, "correctness": 4},
        "rejected": {"response": "No.", "helpfulness": 1, "correctness": 4},
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


def lines(*records):
    return "".join(json.dumps(each) + "\n" for each in records)


def side(**changes):
    made = {"response": "Here.", "helpfulness": 5, "correctness": 4}
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


GOOD = record()
ULTRA = {
    "instruction": "Where?",
    "completions": [
        {"response": text, "overall_score": score, "annotations": {"helpfulness": {"Rating": "3"}}}
        for text, score in (("Here.", 8.0), ("No.", 2.0))
    ],
}
STEER = [
    {"prompt": "Where?", "response": text, "helpfulness": score, "correctness": 2}
    for text, score in (("Here.", 4), ("No.", 0))
]
TRL = {"prompt": "Where?", "chosen": "Here.", "rejected": "No.", "helpfulness_chosen": 4, "helpfulness_rejected": 1,
       "correctness_chosen": 4, "correctness_rejected": 4}  # fmt: skip

# (name of the file, its text or bytes, what the report has to say)
FILES = [
    ("empty.json", "", "empty file"),
    ("blank.json", " \n\n", "empty file"),
    ("empty_list.json", "[]", "a list without records"),
    ("empty.jsonl", "", "empty file"),
    ("blank.jsonl", "\n \n", "empty file"),
    ("cut.json", '[{"prompt": "Whe', "truncated file"),
    ("cut_number.json", '[{"prompt": 1', "truncated file"),
    ("cut.jsonl", lines(GOOD) + '{"prompt": "Wh', "record 1, line 2"),
    ("comma.json", '[{"prompt": "a",}]', "invalid JSON"),
    ("quotes.json", "[{'prompt': 'a'}]", "invalid JSON"),
    ("nan_key.json", "[{prompt: 1}]", "invalid JSON"),
    ("object.json", json.dumps(GOOD), "the top level is dict"),
    ("number.json", "3", "the top level is int"),
    ("text.json", '"pairs"', "the top level is str"),
    ("null.json", "null", "the top level is NoneType"),
    ("lines_in.json", lines(GOOD, GOOD), "name the file .jsonl"),
    ("list_in.jsonl", json.dumps([GOOD]), "name the file .json "),
    ("html.json", "<html><body>Not found</body></html>", "invalid JSON"),
    ("deep.json", "[" * 200_000, "nested too deep"),
    ("deep.jsonl", '{"a":' * 100_000, "nested too deep"),
    ("digits.json", "[" + "9" * 5000 + "]", "invalid JSON"),
    ("latin.json", b'[{"prompt": "caf\xe9"}]', "not UTF-8"),
    ("latin.jsonl", lines(GOOD).encode() + b'{"prompt": "caf\xe9"}\n', "line 2"),
    ("utf16.json", json.dumps([GOOD]).encode("utf-16"), "not UTF-8"),
    ("binary.json", bytes(range(256)) * 4, "not UTF-8"),
    ("zip.json", b"PK\x03\x04" + b"\0" * 40, "invalid JSON"),
    ("pairs.txt", lines(GOOD), "unknown file type"),
    ("pairs.pkl", b"\x80\x04K\x01.", "unknown file type"),
    ("pairs", lines(GOOD), "unknown file type"),
    ("pairs.yaml", "prompt: a", "unknown file type"),
    ("pairs.json.zip", b"PK", "unknown file type"),
    ("plain.jsonl.gz", lines(GOOD), "unreadable file"),
    ("cut.jsonl.gz", gzip.compress(lines(*[GOOD] * 50).encode())[:60], "unreadable file"),
    ("pairs.parquet.gz", gzip.compress(b"x"), "unknown file type"),
    ("no.parquet", lines(GOOD), "invalid Parquet"),
    ("empty.parquet", b"", "invalid Parquet"),
    ("header.csv", "prompt,chosen,rejected\n", "empty file"),
    ("empty.csv", "", "empty file"),
    ("twice.csv", "prompt,chosen,chosen\na,b,c\n", "two columns named 'chosen'"),
    ("cells.csv", "prompt,chosen,rejected\na,b\n", "2 cells under 3 columns"),
    ("quote.csv", 'prompt,chosen,rejected\n"a,b,c\n', "invalid CSV"),
    ("quote_inside.csv", 'prompt,chosen,rejected\n"a"b,b,c\n', "invalid CSV"),
    ("nul.csv", "prompt,chosen,rejected\na\0,b,b\n", "no record has a score 'helpfulness'"),
    ("keys.json", json.dumps([{"question": "a", "answer": "b"}]), "unknown format"),
    ("strings.json", json.dumps(["a", "b"]), "record 0: wrong type"),
    ("lists.json", json.dumps([[1], [2]]), "record 0: wrong type"),
    ("nulls.json", json.dumps([None]), "record 0: wrong type"),
    ("one_null.json", json.dumps([GOOD, None]), "record 1: wrong type"),
    ("no_prompt.json", json.dumps([record(prompt=...)]), "field 'prompt': missing field"),
    ("null_prompt.json", json.dumps([record(prompt=None)]), "field 'prompt': missing field"),
    ("number_prompt.json", json.dumps([record(prompt=3)]), "field 'prompt': wrong type"),
    ("blank_prompt.json", json.dumps([record(prompt=" ")]), "field 'prompt': empty text"),
    ("no_messages.json", json.dumps([record(prompt=[])]), "field 'prompt': empty text"),
    ("role.json", json.dumps([record(prompt=[{"role": "human", "content": "a"}])]), "unknown role"),
    ("no_role.json", json.dumps([record(prompt=[{"content": "a"}])]), "prompt[0].role"),
    ("no_content.json", json.dumps([record(prompt=[{"role": "user"}])]), "prompt[0].content"),
    ("last.json", json.dumps([record(prompt=[{"role": "assistant", "content": "a"}])]), "wrong order"),
    ("surrogate.json", '[{"prompt": "\\ud83d", "chosen": {}, "rejected": {}}]', "surrogate"),
    ("no_chosen.json", json.dumps([GOOD, record(chosen=...)]), "field 'chosen.response': missing field"),
    ("chosen_list.json", json.dumps([record(chosen=["a"])]), "field 'chosen': wrong type"),
    ("no_response.json", json.dumps([record(chosen=side(response=...))]), "'chosen.response'"),
    ("blank_response.json", json.dumps([record(rejected=side(response=""))]), "'rejected.response': empty text"),
    ("number_response.json", json.dumps([record(rejected=side(response=7))]), "'rejected.response': wrong type"),
    ("same.json", json.dumps([record(rejected=side())]), "identical sides"),
    ("no_score.json", json.dumps([GOOD, record(chosen=side(helpfulness=...))]), "record 1, field 'chosen.helpfulness'"),
    ("no_scores.json", json.dumps([record(chosen={"response": "a"})]), "no record has a score 'helpfulness'"),
    ("text_score.json", json.dumps([record(chosen=side(helpfulness="5"))]), "'chosen.helpfulness': wrong type"),
    ("bool_score.json", json.dumps([record(chosen=side(helpfulness=True))]), "'chosen.helpfulness': wrong type"),
    ("nan_score.json", json.dumps([record(chosen=side(helpfulness=float("nan")))]), "not finite"),
    ("high_score.json", json.dumps([record(chosen=side(helpfulness=6))]), "score out of range"),
    ("low_score.json", json.dumps([record(rejected=side(response="b", helpfulness=-1))]), "score out of range"),
    ("trl_kinds.jsonl", lines({**TRL, "chosen": [{"role": "assistant", "content": "a"}]}), "field 'rejected'"),
    ("trl_prompt.jsonl", lines({k: v for k, v in TRL.items() if k != "prompt"}), "field 'prompt'"),
    ("trl_score.jsonl", lines(TRL, {**TRL, "helpfulness_rejected": "low"}), "record 1, line 2, field 'helpfulness_rej"),
    ("trl_user.jsonl", lines({**TRL, "chosen": [{"role": "user", "content": "a"}], "rejected": []}), "wrong order"),
    ("ultra_list.jsonl", lines({**ULTRA, "completions": {"a": 1}}), "field 'completions': wrong type"),
    ("ultra_items.jsonl", lines({**ULTRA, "completions": [1, 2]}), "field 'completions': wrong type"),
    ("ultra_scores.jsonl", lines({**ULTRA, "completions": [{"response": "a"}, {"response": "b"}]}), "overall_score"),
    ("ultra_rating.jsonl", lines(ULTRA), "no record has a score 'correctness'"),
    ("steer_rank.jsonl", lines({"prompt": "a", "response": "b", "correctness": 1}, STEER[0]), "no usable record"),
    ("steer_score.jsonl", lines(STEER[0], {**STEER[1], "correctness": 9}), "score out of range"),
    ("steer_text.jsonl", lines(STEER[0], {**STEER[1], "helpfulness": "low"}), "nothing to rank"),
    ("steer_null.jsonl", lines(*STEER, 3), "wrong type"),
    ("preference.jsonl", lines({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1}),
     "no scores"),
]  # fmt: skip


def said(capsys):
    out, err = capsys.readouterr()
    return re.sub(r"\s+", " ", out), err


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
def test_a_broken_file_is_reported(tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.setenv("COLUMNS", "500")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code = main(["validate", str(path), "--dimensions", "no_object", "helpfulness", "correctness"])
    out, err = said(capsys)
    assert code == 1 and "Traceback" not in out + err
    assert re.search(re.escape(message) if "|" not in message else message, out), out
    assert str(path) in out and "Remedy: " in out


def test_paths_that_are_no_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")  # which is asked about folders and names
    monkeypatch.setenv("COLUMNS", "500")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty").mkdir()
    for path in ("missing.json", "folder.json", "empty", "no/such/data-set", "missing.parquet", "missing.csv"):
        assert main(["validate", str(tmp_path / path)]) == 1
        out, err = said(capsys)
        assert str(tmp_path / path) in out and "Remedy: " in out and "Traceback" not in out + err


def test_a_parquet_file_of_other_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    pq.write_table(pa.table({"image": [b"\x89PNG"], "caption": [None]}), tmp_path / "x.parquet")
    assert main(["validate", str(tmp_path / "x.parquet")]) == 1
    out, _ = said(capsys)
    assert "records with the keys caption, image" in out and "Remedy: " in out


BROKEN_BYTES = json.dumps([GOOD, GOOD, record(prompt=[{"role": "user", "content": "a"}])], indent=1).encode()


@given(
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".jsonl.gz"]),
    cuts=st.lists(st.tuples(st.integers(0, len(BROKEN_BYTES)), st.binary(max_size=6)), min_size=1, max_size=5),
    whole=st.booleans(),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_out_of_place_never_end_in_a_traceback(tmp_path, capsys, suffix, cuts, whole):
    content = BROKEN_BYTES
    for place, inserted in cuts:
        content = content[:place] + inserted + (content[place + 1 :] if whole else b"")
    path = tmp_path / f"fuzzed{suffix}"
    path.write_bytes(content)
    code = main(["validate", str(path), "--dimensions", "no_object", "helpfulness"])
    out, err = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in out + err
    assert code == 0 or "Remedy:" in out.replace("\n", " ")


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "response", "helpfulness", "Rating"]), inner, max_size=4),
    max_leaves=8,
)
KEYS = ["prompt", "chosen", "rejected", "response", "helpfulness", "instruction", "completions", "response_1",
        "preference_strength", "helpfulness_chosen", "chosen_scores", "split"]  # fmt: skip


@given(records=st.lists(st.dictionaries(st.sampled_from(KEYS), SCRAPS, max_size=7) | SCRAPS, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_of_any_shape_never_end_in_a_traceback(tmp_path, capsys, records):
    path = tmp_path / "fuzzed.jsonl"
    path.write_text(lines(*records))
    code = main(["validate", str(path), "--dimensions", "no_object", "helpfulness"])
    out, err = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in out + err
    assert code == 0 or "Remedy:" in out.replace("\n", " ")

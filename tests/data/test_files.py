"""Files in bounded memory: a list a record at a time, and what is too large by name."""

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.data.pairs import read_pairs
from amopo_fast.data.sources import json_list
from amopo_fast.data.sources.files import file_records
from amopo_fast.data.sources.json_list import list_records
from amopo_fast.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(json_list, "_CHUNK", 7)


def read(data: bytes):
    return [raw.value for raw in list_records(io.BytesIO(data), "pairs.json")]


@given(
    values=st.lists(JSON, min_size=1, max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    blanks=st.sampled_from(["", " ", "\n\n", "\r\n\t"]),
    bom=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_list_read_in_pieces_is_the_list(values, indent, ascii, blanks, bom):
    text = blanks + json.dumps(values, indent=indent, ensure_ascii=ascii) + blanks
    assert read(b"\xef\xbb\xbf" * bom + text.encode()) == values


@given(values=st.lists(JSON, min_size=1, max_size=4), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_list_that_is_cut_or_damaged_is_an_error_where_json_has_one(values, data):
    content = json.dumps(values, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False).encode()
    place = data.draw(st.integers(1, len(content) - 1))
    inserted = data.draw(st.sampled_from([b"", b",", b"]", b"x", b'"', b"\n", b"\xff", b"{"]))
    damaged = content[:place] + inserted + (content[place:] if inserted else b"")
    try:
        expected = json.loads(damaged)
        assert isinstance(expected, list)
    except UnicodeDecodeError as error:
        with pytest.raises(DataError) as caught:
            read(damaged)
        # An earlier mistake may be found first: the list is not read to its end for one of the encoding.
        if caught.value.kind == "not UTF-8":
            assert f"offset {error.start}" in caught.value.found
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as caught:
            read(damaged)
        if damaged.startswith(b"[") and damaged[1:].lstrip().startswith(b"]"):
            assert caught.value.kind == "empty file"
            return
        assert caught.value.kind in ("truncated file", "invalid JSON") and caught.value.line == error.lineno
        if error.msg != "Illegal trailing comma before end of array":
            assert caught.value.found.endswith(f"column {error.colno}")
    else:
        assert read(damaged) == expected


def test_a_long_list_takes_the_memory_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHUNK", 1 << 16)
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": f"{i} " * 200} for i in range(20_000)]))
    tracemalloc.start()
    count = sum(1 for _ in file_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and path.stat().st_size > 20e6 and peak < 2e6


TOO_LONG = "a" * (json_list.RECORD_BYTES + 10)
GOOD = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("pairs.jsonl", lambda: f'{json.dumps(GOOD)}\n{{"prompt": "{TOO_LONG}"}}\n', "line 2"),
        ("pairs.jsonl.gz", lambda: f'{json.dumps(GOOD)}\n"{TOO_LONG}"\n', "line 2"),
        ("pairs.json", lambda: f'[{json.dumps(GOOD)},\n{{"prompt": "{TOO_LONG}"}}]', "record 1, line 2"),
        ("pairs.json.gz", lambda: f'[{json.dumps(GOOD)},\n"{TOO_LONG}', "record 1, line 2"),
        ("pairs.csv", lambda: f'prompt,chosen,rejected\na,b,c\n"{TOO_LONG}",b,c\n', "line 3"),
        ("open.csv", lambda: 'prompt,chosen,rejected\n"' + ("a" * 1000 + "\n") * (70 << 10), "line [0-9]+"),
    ],
)
def test_a_record_that_is_too_large_is_named(tmp_path, monkeypatch, name, content, place):
    monkeypatch.setattr(json_list, "_CHUNK", 1 << 20)
    path = tmp_path / name
    data = content().encode()
    path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=f"{name}, {place}: record too large: more than 64 MiB.*Remedy"):
        read_pairs(path, dimensions=("no_object",), on_bad_record="skip")


def test_a_row_that_is_too_large_is_named(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "chosen": TOO_LONG}, GOOD]), path)
    with pytest.raises(DataError, match="record 1: record too large"):
        read_pairs(path, dimensions=("no_object",))
    pq.write_table(pa.Table.from_pylist([{**GOOD, "prompt": "a" * (4 << 20)}] * 18), path)
    assert len(read_pairs(path, dimensions=("no_object",))[0]) == 18

"""Local files into raw records. Mistakes of a whole file raise; a bad line of a JSONL file costs that line only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from amopo_fast.errors import DataError, shown
from amopo_fast.sources.candidate import RawRecord

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES)


def raw_records(path: str | Path) -> Iterator[RawRecord | DataError]:
    """Records of a JSON list or a JSONL file, in order, numbered from 0; blank lines of a JSONL file do not count.

    Yields a DataError in the place of a JSONL line that is no JSON. Raises DataError for what spoils the whole file:
    it cannot be read, is not UTF-8, is empty, is cut off, or its top level is no list.
    """
    path = Path(path)
    source = str(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            "unknown file type",
            f"the name ends in '{path.suffix}'",
            f"give the file a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}",
            source=source,
        )
    text = _read_text(path, source)
    if path.suffix.lower() in LINE_SUFFIXES:
        yield from _lines(text, source)
    else:
        yield from _list(text, source)


def _read_text(path: Path, source: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            "unreadable file", error.strerror or str(error), "check the path and its permissions", source=source
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8",
            f"byte 0x{data[error.start]:02x} at offset {error.start}",
            "save the file as UTF-8",
            source=source,
            line=data.count(b"\n", 0, error.start) + 1,
        ) from None
    if not text.strip():
        raise DataError("empty file", "no records", "check that the export that wrote it finished", source=source)
    return text


def _list(text: str, source: str) -> Iterator[RawRecord]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            raise _no_list("one object after another", source) from None
        raise _invalid(error, text, source, error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise _unloadable(error, source) from None
    if not isinstance(value, list):
        raise _no_list(shown(value), source)
    if not value:
        raise DataError("empty file", "a list without records", "add records to it", source=source)
    for record, item in enumerate(value):
        yield RawRecord(record, None, item)


def _lines(text: str, source: str) -> Iterator[RawRecord | DataError]:
    if text.lstrip().startswith("["):
        raise DataError(
            "no lines of records",
            "the file begins with a list",
            "name the file .json if it is one list of objects; a .jsonl file holds one object per line",
            source=source,
        )
    record = 0
    # Not splitlines(): U+2028 and its like are line ends to it, and legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield RawRecord(record, number, json.loads(line))
        except json.JSONDecodeError as error:
            yield _invalid(error, line, source, number, record)
        except (ValueError, RecursionError) as error:
            yield _unloadable(error, source, number, record)
        record += 1


def _invalid(error: json.JSONDecodeError, text: str, source: str, line: int, record: int | None = None) -> DataError:
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return DataError(
            "truncated file",
            f"the text ends inside a value that begins or goes on at column {error.colno}",
            "write the file again: its end is missing, or a quote or bracket is never closed"
            + ("; every record of a .jsonl file is one line" if record is not None else ""),
            source=source,
            line=line,
            record=record,
        )
    return DataError(
        "invalid JSON",
        f"{error.msg.lower()} at column {error.colno}",
        "correct the JSON there; one object per line in a .jsonl file, one list of objects in a .json file",
        source=source,
        line=line,
        record=record,
    )


def _unloadable(error: Exception, source: str, line: int | None = None, record: int | None = None) -> DataError:
    found = "values nested too deep" if isinstance(error, RecursionError) else str(error)
    return DataError(
        "invalid JSON", found, "write plain records of strings and numbers", source=source, line=line, record=record
    )


def _no_list(found: str, source: str) -> DataError:
    return DataError(
        "no list of records",
        f"the top level is {found}",
        "write one list of objects, or name the file .jsonl if every line holds one object",
        source=source,
    )

"""Local files into raw records. Mistakes of a whole file raise; a bad line of a JSONL file costs that line only."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from amopo_fast.data.sources.candidate import RawRecord
from amopo_fast.errors import DataError, shown

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES, ".csv", ".parquet")
_PARQUET_ROWS = 256  # rows in memory at a time
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "response", "response_1", "response_2", "instruction")


def file_records(path: str | Path) -> Iterator[RawRecord | DataError]:
    """Records of a file, in order, numbered from 0; blank lines of a JSONL file do not count. Only a JSON list is read
    whole, the others a piece at a time.

    Yields a DataError in the place of a JSONL line that is no JSON. Raises DataError for what spoils the whole file:
    it cannot be read, is not UTF-8, is empty, is cut off, or its top level is no list.
    """
    path = Path(path)
    source = str(path)
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if suffix not in SUFFIXES or (packed and suffix == ".parquet"):
        raise DataError(
            "unknown file type",
            f"the name ends in '{''.join(path.suffixes[-2:]) if packed else path.suffix}'",
            f"give the file a name that ends in {', '.join(SUFFIXES[:-1])} (or one of these and .gz) or {SUFFIXES[-1]}",
            source=source,
        )
    try:
        if suffix == ".parquet":
            yield from _parquet(path, source)
            return
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            if suffix in LINE_SUFFIXES:
                yield from _lines(file, source)
            elif suffix == ".csv":
                yield from _rows(file, source)
            else:
                yield from _list(_decoded(file.read(), source), source)
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DataError(
            "unreadable file", found, "check the path, its permissions and that it was copied whole", source=source
        ) from None


def _decoded(data: bytes, source: str, line: int | None = None, start: int = 0) -> str:
    try:
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8",
            f"byte 0x{data[error.start]:02x} at offset {start + error.start}",
            "save the file as UTF-8",
            source=source,
            line=line or data.count(b"\n", 0, error.start) + 1,
        ) from None


def _empty(source: str) -> DataError:
    return DataError("empty file", "no records", "check that the export that wrote it finished", source=source)


def _parquet(path: Path, source: str) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    record = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    yield RawRecord(record, None, value)
                    record += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())
        raise DataError("invalid Parquet", found, "write the file again, it may be cut off", source=source) from None
    if not record:
        raise _empty(source)


def _rows(file: Iterable[bytes], source: str) -> Iterator[RawRecord | DataError]:
    """Rows of a CSV file under its header. Cells outside the text columns that look like numbers become numbers; empty
    cells are missing."""
    lines = (text for text, _, _ in _text_lines(file, source))
    # Long answers exceed the reader's default limit of 128 KiB a cell.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if not header or not any(name.strip() for name in header):
            raise _empty(source)
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError("invalid CSV", f"two columns named '{twice}'", "rename one", source=source, line=1)
        record = 0
        while (cells := next(reader, None)) is not None:
            line = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                yield DataError(
                    "invalid CSV",
                    f"{len(cells)} cells under {len(header)} columns",
                    "put quotes around cells that hold commas or line ends",
                    source=source,
                    line=line,
                    record=record,
                )
            else:
                yield RawRecord(record, line, {n: _cell(n, c) for n, c in zip(header, cells, strict=True) if c != ""})
            record += 1
    except csv.Error as error:
        remedy = "put quotes around cells that hold quotes, commas or line ends, and double the quotes inside them"
        raise DataError("invalid CSV", str(error), remedy, source=source, line=reader.line_num) from None
    if not record:
        raise _empty(source)


def _cell(name: str, text: str) -> Any:
    if name in _TEXT_COLUMNS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _text_lines(file: Iterable[bytes], source: str) -> Iterator[tuple[str, int, int]]:
    """(line with its end, its number from 1, its offset in bytes)."""
    offset = 0
    # A binary file splits at \n alone: U+2028 and its like are legal inside a JSON string.
    for number, line in enumerate(file, start=1):
        yield _decoded(line, source, number, offset), number, offset
        offset += len(line)


def _list(text: str, source: str) -> Iterator[RawRecord]:
    if not text.strip():
        raise _empty(source)
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


def _lines(file: Iterable[bytes], source: str) -> Iterator[RawRecord | DataError]:
    record = 0
    for line, number, _ in _text_lines(file, source):
        if not line.strip():
            continue
        if not record and line.lstrip().startswith("["):
            raise DataError(
                "no lines of records",
                "the file begins with a list",
                "name the file .json if it is one list of objects; a .jsonl file holds one object per line",
                source=source,
            )
        try:
            yield RawRecord(record, number, json.loads(line))
        except json.JSONDecodeError as error:
            yield _invalid(error, line, source, number, record)
        except (ValueError, RecursionError) as error:
            yield _unloadable(error, source, number, record)
        record += 1
    if not record:
        raise _empty(source)


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

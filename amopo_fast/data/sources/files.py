"""Local files into raw records. Mistakes of a whole file raise; a bad line of a JSONL file costs that line only."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from amopo_fast.data.sources.candidate import RawRecord
from amopo_fast.data.sources.json_list import (
    RECORD_BYTES,
    invalid,
    is_at_end,
    list_records,
    not_utf8,
    too_large,
    unloadable,
)
from amopo_fast.errors import DataError
from amopo_fast.text_files import refuse_pipe

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES, ".csv", ".parquet")
_PARQUET_ROWS = 256  # rows in memory at a time, fewer of large ones
_PARQUET_BYTES = 16 << 20
# What tables make of a list of messages, whether as JSON or as Python writes it.
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_CONVERSATION_COLUMNS = ("prompt", "chosen", "rejected", "conversations")
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "response", "response_1", "response_2", "instruction")


def file_records(path: str | Path) -> Iterator[RawRecord | DataError]:
    """Records of a file, in order, numbered from 0; blank lines of a JSONL file do not count. A record is in memory at
    a time (of Parquet some), whatever the file's size or, packed, what it unpacks to.

    Yields a DataError in the place of a JSONL line that is no JSON. Raises DataError for what spoils the whole file:
    it cannot be read, is not UTF-8, is empty, is cut off, its top level is no list, or a record is larger than
    `RECORD_BYTES`.
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
        refuse_pipe(path)
        if suffix == ".parquet":
            yield from _parquet(path, source)
            return
        opened: BinaryIO = gzip.open(path, "rb") if packed else path.open("rb")
        with opened as file:
            if suffix in LINE_SUFFIXES:
                yield from _lines(file, source)
            elif suffix == ".csv":
                yield from _rows(file, source)
            else:
                yield from list_records(file, source)
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DataError(
            "unreadable file", found, "check the path, its permissions and that it was copied whole", source=source
        ) from None


def _empty(source: str) -> DataError:
    return DataError("empty file", "no records", "check that the export that wrote it finished", source=source)


def _parquet(path: Path, source: str) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    record = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
            rows = min(max(_PARQUET_BYTES // max(row_bytes, 1), 1), _PARQUET_ROWS)
            for batch in file.iter_batches(batch_size=rows):
                for index in range(len(batch)) if batch.nbytes > RECORD_BYTES else ():
                    if batch.slice(index, 1).nbytes > RECORD_BYTES:
                        raise too_large(source, record + index)
                for value in batch.to_pylist():
                    yield RawRecord(record, None, value)
                    record += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())
        raise DataError("invalid Parquet", found, "write the file again, it may be cut off", source=source) from None
    if not record:
        raise _empty(source)


def _rows(file: BinaryIO, source: str) -> Iterator[RawRecord | DataError]:
    """Rows of a CSV file under its header. Cells outside the text columns that look like numbers become numbers; empty
    cells are missing."""
    lines = (text for text, _ in _text_lines(file, source))
    # Long answers exceed the reader's default limit of 128 KiB a cell.
    csv.field_size_limit(RECORD_BYTES)
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
                try:
                    cells = {n: _cell(n, c) for n, c in zip(header, cells, strict=True) if c != ""}
                except _NoConversation as error:
                    yield DataError(
                        "invalid JSON", f"a conversation that is none: {error}", "write the cell's messages as JSON",
                        source=source, line=line, record=record, field=error.column,
                    )  # fmt: skip
                else:
                    yield RawRecord(record, line, cells)
            record += 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise too_large(source, None, reader.line_num) from None
        remedy = "put quotes around cells that hold quotes, commas or line ends, and double the quotes inside them"
        raise DataError("invalid CSV", str(error), remedy, source=source, line=reader.line_num) from None
    if not record:
        raise _empty(source)


class _NoConversation(ValueError):
    def __init__(self, column: str, message: str):
        super().__init__(message)
        self.column = column


def _cell(name: str, text: str) -> Any:
    if name in _CONVERSATION_COLUMNS and _CONVERSATION.match(text):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _NoConversation(name, str(error) or "values nested too deep") from None
    if name in _TEXT_COLUMNS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _text_lines(file: BinaryIO, source: str) -> Iterator[tuple[str, int]]:
    """(line with its end, its number from 1)."""
    offset = number = 0
    # A binary file splits at \n alone: U+2028 and its like are legal inside a JSON string.
    while line := file.readline(RECORD_BYTES + 1):
        number += 1
        if len(line) > RECORD_BYTES:
            raise too_large(source, None, number)
        try:
            yield line.decode("utf-8" if offset else "utf-8-sig"), number
        except UnicodeDecodeError as error:
            raise not_utf8(line, error, source, offset, number) from None
        offset += len(line)


def _lines(file: BinaryIO, source: str) -> Iterator[RawRecord | DataError]:
    record = 0
    for line, number in _text_lines(file, source):
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
            yield invalid(error.msg, is_at_end(error, line), error.colno, source, number, record, of_lines=True)
        except (ValueError, RecursionError) as error:
            yield unloadable(error, source, number, record)
        record += 1
    if not record:
        raise _empty(source)

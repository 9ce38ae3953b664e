"""One list of records in a JSON file, a record at a time: memory is that of the largest record, not of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from amopo_fast.data.sources.candidate import RawRecord
from amopo_fast.errors import DataError, shown

RECORD_BYTES = 64 << 20  # a record with more text than this is no preference but a mistake of an export
_CHUNK = 1 << 20
_NEAR = 16  # characters: a number, a literal or an escape that a chunk's end cuts is shorter
_NO_BLANK = re.compile(r"[^ \t\n\r]")


def too_large(source: str, record: int | None, line: int | None = None) -> DataError:
    """The error of a record that is longer than `RECORD_BYTES`."""
    return DataError(
        "record too large",
        f"more than {RECORD_BYTES >> 20} MiB in one record",
        "split it, drop it, or check that records are apart from each other",
        source=source,
        record=record,
        line=line,
    )


def invalid(
    message: str, at_end: bool, column: int, source: str, line: int, record: int | None, of_lines: bool
) -> DataError:
    """The error of text that is no JSON; `at_end` where the text ended too early."""
    if at_end:
        return DataError(
            "truncated file",
            f"the text ends inside a value that begins or goes on at column {column}",
            "write the file again: its end is missing, or a quote or bracket is never closed"
            + ("; every record of a .jsonl file is one line" if of_lines else ""),
            source=source,
            line=line,
            record=record,
        )
    return DataError(
        "invalid JSON",
        f"{message.lower()} at column {column}",
        "correct the JSON there; one object per line in a .jsonl file, one list of objects in a .json file",
        source=source,
        line=line,
        record=record,
    )


def unloadable(error: Exception, source: str, line: int | None = None, record: int | None = None) -> DataError:
    """The error of JSON that Python cannot hold."""
    found = "values nested too deep" if isinstance(error, RecursionError) else str(error)
    return DataError(
        "invalid JSON", found, "write plain records of strings and numbers", source=source, line=line, record=record
    )


def not_utf8(data: bytes, error: UnicodeDecodeError, source: str, offset: int, line: int) -> DataError:
    """The error of bytes that are no text; `offset` and `line` are those of the first of `data`."""
    return DataError(
        "not UTF-8",
        f"byte 0x{data[error.start]:02x} at offset {offset + error.start}",
        "save the file as UTF-8",
        source=source,
        line=line + data.count(b"\n", 0, error.start),
    )


def is_at_end(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text is right as far as it goes."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


class _Text:
    """The file's text from the value that is being read on."""

    def __init__(self, file: BinaryIO, source: str):
        self._file, self._source = file, source
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._offset, self._byte_line = 0, 1  # of the next byte
        self.buffer, self.position, self.ended = "", 0, False
        self._line, self._column = 1, 1  # of the buffer's beginning

    def more(self) -> bool:
        """Reads on; at least as much as is waiting, so that a long value is looked at few times. False at the end."""
        if self.ended:
            return False
        if self.position > _CHUNK:
            self._line, self._column = self.place(self.position)
            self.buffer, self.position = self.buffer[self.position :], 0
        data = self._file.read(max(_CHUNK, len(self.buffer) - self.position))
        self.ended = not data
        try:
            self.buffer += self._decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            waiting = len(error.object) - len(data)  # bytes of a character that the last chunk cut
            raise not_utf8(error.object, error, self._source, self._offset - waiting, self._byte_line) from None
        self._offset += len(data)
        self._byte_line += data.count(b"\n")
        return True

    def place(self, position: int) -> tuple[int, int]:
        """(line, column) in the file, from 1."""
        lines = self.buffer.count("\n", 0, position)
        if lines:
            return self._line + lines, position - self.buffer.rindex("\n", 0, position)
        return self._line, self._column + position

    def next_character(self) -> str:
        """The next one that is no blank, and moves there; "" at the end."""
        while True:
            found = _NO_BLANK.search(self.buffer, self.position)
            if found:
                self.position = found.start()
                return found[0]
            self.position = len(self.buffer)
            if not self.more():
                return ""

    def value(self, record: int) -> Any:
        """The JSON value at the position, and moves behind it."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                at_end = error.pos >= len(self.buffer) - _NEAR or error.msg.startswith("Unterminated string")
                if not at_end or not self.more():
                    raise self.error(error.msg, error.pos, is_at_end(error, self.buffer)) from None
            except (ValueError, RecursionError) as error:
                raise unloadable(error, self._source) from None
            else:
                if end < len(self.buffer) - _NEAR or not self.more():  # a number might go on: 1|.5, 1e|5
                    self.position = end
                    return value
            if len(self.buffer) - self.position > RECORD_BYTES:
                raise too_large(self._source, record, self.place(self.position)[0])

    def error(self, message: str, position: int, at_end: bool) -> DataError:
        line, column = self.place(position)
        return invalid(message, at_end, column, self._source, line, None, of_lines=False)

    def rest(self) -> str:
        """All of the text from the position on, as far as a record may go."""
        while len(self.buffer) - self.position <= RECORD_BYTES and self.more():
            pass
        return self.buffer[self.position :]


def list_records(file: BinaryIO, source: str) -> Iterator[RawRecord]:
    """The records of a list, numbered from 0.

    Raises DataError where the file is empty, no JSON, no list, cut off, or has a record that is too large.
    """
    text = _Text(file, source)
    first = text.next_character()
    if not first:
        raise DataError("empty file", "no records", "check that the export that wrote it finished", source=source)
    if first != "[":
        raise _no_list(text, source)
    text.position += 1
    record = 0
    if text.next_character() == "]":
        raise DataError("empty file", "a list without records", "add records to it", source=source)
    while True:
        if not text.next_character():
            raise text.error("", text.position, at_end=True)
        yield RawRecord(record, None, text.value(record))
        record += 1
        character = text.next_character()
        if character not in (",", "]"):
            raise text.error("expecting ',' delimiter", text.position, at_end=not character)
        text.position += 1
        if character == "]":
            break
    if text.next_character():
        raise text.error("extra data", text.position, at_end=False)


def _no_list(text: _Text, source: str) -> DataError:
    content = text.rest()
    try:
        found = shown(json.loads(content))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not content.startswith("{"):
            return text.error(error.msg, text.position + error.pos, is_at_end(error, content))
        found = "one object after another"
    except (ValueError, RecursionError) as error:
        return unloadable(error, source)
    return DataError(
        "no list of records",
        f"the top level is {found}",
        "write one list of objects, or name the file .jsonl if every line holds one object",
        source=source,
    )

"""The errors of a run. Each message names the place, what was found there and what to do about it."""

from __future__ import annotations

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = 4
_short.maxlevel = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message names it and the remedy."""


class NumbersError(RuntimeError):
    """A NaN or an infinity; the message says where, in which step, and which file holds the step's records."""


class OptionError(ValueError):
    """An option that cannot be used; the message says why and what to use.

    Attributes:
        option: its name, "" where several or none are meant; a command line says where it was set.
    """

    def __init__(self, message: str, option: str = ""):
        super().__init__(message)
        self.option = option


def shown(value: object) -> str:
    """A value as an error message shows it: its type and at most about 60 characters of it."""
    return f"{type(value).__name__} {_short.repr(value)}"


class DataError(ValueError):
    """One thing that is wrong with a data file.

    Attributes:
        kind: short name of the kind of mistake; reports count by it ("missing field", "wrong type", ...).
        found: what stands there.
        remedy: what the person who owns the file can do.
        source: file or data-set name; "" where it is not known.
        record: number of the record, from 0; None for a mistake of the whole file.
        line: line of the file, from 1; None where the format has no useful lines.
        field: name of the field as the source spells it; "" for a mistake of the whole record.
    """

    def __init__(
        self,
        kind: str,
        found: str,
        remedy: str,
        *,
        source: str = "",
        record: int | None = None,
        line: int | None = None,
        field: str = "",
    ):
        self.kind, self.found, self.remedy = kind, found, remedy
        self.source, self.record, self.line, self.field = source, record, line, field
        super().__init__(kind, found, remedy)

    def __str__(self) -> str:
        place = [self.source or "data"]
        if self.record is not None:
            place.append(f"record {self.record}")
        if self.line is not None:
            place.append(f"line {self.line}")
        if self.field:
            place.append(f"field '{self.field}'")
        return f"{', '.join(place)}: {self.kind}: {self.found}. Remedy: {self.remedy}."

    def __reduce__(self):
        # Keyword-only arguments are lost by the default pickling, which data-loader workers use to report errors.
        return _rebuild, (self.kind, self.found, self.remedy, self.source, self.record, self.line, self.field)


def _rebuild(kind, found, remedy, source, record, line, field) -> DataError:
    return DataError(kind, found, remedy, source=source, record=record, line=line, field=field)

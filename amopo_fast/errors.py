"""The errors of a run, and the checks of their own values that all configurations share.

Each message names the place, what was found there and what to do about it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import typing
from collections.abc import Iterable
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = 4
_short.maxlevel = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message names it and the remedy."""


class NumbersError(RuntimeError):
    """A NaN or an infinity; the message says where, in which step, and which file holds the step's records."""


class ModelError(ValueError):
    """Files of a model or an adapter that cannot be used; the message names them and the remedy."""


class JudgeError(RuntimeError):
    """A judge of answers cannot go on; the message names it, what it said and the remedy."""


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


def of_a_library(error: BaseException) -> str:
    """A library's error in one line of about 400 characters, without advice that is no user's to take."""
    text = " ".join(str(error).split()) or type(error).__name__
    stumbled = re.search(r"(?:'(\w+)' object (?:has no attribute|is not)|between instances of '\w+' and '(\w+)')", text)
    if stumbled:  # where a file has a value of another type than the library expects
        return f"a value in one of its files is of the wrong type, {stumbled[1] or stumbled[2]}"
    if "trust_remote_code" in text:
        return "it asks for code of the Hub, which is not run"
    return text[:400]


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass's instance that are not at their default, with their values."""
    found = {}
    for each in dataclasses.fields(config):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        value = getattr(config, each.name, default)
        if value is not default and value != default:
            found[each.name] = value
    return found


@dataclasses.dataclass(frozen=True)
class Needs:
    """`option` is read only where `other` is one of `values` (none: where it is set at all)."""

    option: str
    other: str
    values: tuple = ()

    def refuse(self, config: Any, changed: dict[str, Any]) -> None:
        """Raises OptionError where the option is set and nothing reads it."""
        if self.option not in changed:
            return
        found = getattr(config, self.other, None)
        each = found if isinstance(found, list) else [found]
        if any(value in self.values for value in each) if self.values else found:
            return
        wanted = f"{self.other} {' or '.join(map(str, self.values))}" if self.values else self.other
        raise OptionError(
            f"{self.option}={changed[self.option]!r} has no effect without {wanted}: set that, or leave "
            f"{self.option} out",
            self.option,
        )


_TAKES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"), int: ((int,), "a whole number"), float: ((int, float), "a number"),
}  # fmt: skip


@functools.cache
def _scalars(kind: Any) -> dict[str, tuple[type, bool]]:
    """bool, int or float by the name of a dataclass's field that is annotated as one, and whether None is one too."""
    hints = typing.get_type_hints(kind)
    found = {}
    for each in dataclasses.fields(kind):
        types = typing.get_args(hints[each.name]) or (hints[each.name],)
        scalars = [scalar for scalar in types if scalar is not type(None)]
        if len(scalars) == 1 and scalars[0] in _TAKES:
            found[each.name] = scalars[0], len(types) > 1
    return found


def check_numbers(
    config: Any, *, positive: Iterable[str] = (), not_negative: Iterable[str] = (), below_one: Iterable[str] = ()
) -> None:
    """Every field of a dataclass's instance that is annotated as bool, int or float holds one ("false" is not false,
    1.5 no whole number, True none at all); numbers are finite, and those that are named lie in their range: above 0,
    from 0, from 0 to below 1.

    Raises:
        OptionError: names the option, its value and what it takes.
    """
    kind: Any = type(config)
    for name, (scalar, or_none) in _scalars(kind).items():
        value, (types, what) = getattr(config, name, None), _TAKES[scalar]
        is_one = isinstance(value, types) and (scalar is bool or not isinstance(value, bool))
        if not is_one and not (or_none and value is None):
            raise OptionError(f"{name} is {shown(value)}: write {what}", name)
    for each in dataclasses.fields(config):
        name, value = each.name, getattr(config, each.name, None)
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{name}={value} must be a finite number", name)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OptionError(f"{name} has {value.bit_length()} bits: write a number below 2**63", name)
    ranges = (
        (positive, "must be positive", lambda value: value > 0),
        (not_negative, "must not be negative", lambda value: value >= 0),
        (below_one, "must be from 0 to below 1", lambda value: 0 <= value < 1),
    )
    for names, what, holds in ranges:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not holds(value):
                raise OptionError(f"{name}={value} {what}", name)


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

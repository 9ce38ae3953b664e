"""A judge that is a function of the user's own: `--judge module:function`."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amopo_fast.errors import JudgeError, OptionError, shown
from amopo_fast.judges.judge import Answer, Usage, nothing


def load_function(spec: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules of the current folder count.

    Raises:
        OptionError: there is no such module or function.
    """
    module, _, name = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"judge {spec!r}: {error}; name a module that Python finds from here", "judge") from None
    finally:
        sys.path.remove(here)
    function = getattr(found, name, None)
    if not callable(function):
        raise OptionError(f"judge {spec!r}: {module} has no function {name!r}; name one that it has", "judge")
    return function


@dataclass
class Program:
    """`function(messages, answer, dimension)` gives a score, or None where it has none; with two answers,
    `function(messages, first, second, dimension)` gives 1 for the first, 0 for the second, 0.5 for a tie."""

    spec: str
    function: Callable[..., Any]
    usage: Usage = field(default_factory=Usage)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "program", "function": self.spec}

    def scores(
        self, answers: Sequence[Answer], dimensions: Sequence[str], done: Callable[[int], None] = nothing
    ) -> np.ndarray:
        return self._table([(list(each.messages), each.text) for each in answers], dimensions, done)

    def preferences(
        self,
        firsts: Sequence[Answer],
        seconds: Sequence[Answer],
        dimensions: Sequence[str],
        done: Callable[[int], None] = nothing,
    ) -> np.ndarray:
        asked = [(list(a.messages), a.text, b.text) for a, b in zip(firsts, seconds, strict=True)]
        table = self._table(asked, dimensions, done)
        bad = table[~np.isnan(table) & ((table < 0) | (table > 1))]
        if len(bad):
            raise JudgeError(f"{self.spec} gave {bad[0]:g} for two answers; return 1, 0.5 or 0, or None")
        return table

    def _table(self, asked: Sequence[tuple], dimensions: Sequence[str], done: Callable[[int], None]) -> np.ndarray:
        table = np.full((len(asked), len(dimensions)), math.nan)
        for row, arguments in enumerate(asked):
            for column, dimension in enumerate(dimensions):
                table[row, column] = self._call(*arguments, dimension)
            done(len(dimensions))
        return table

    def _call(self, *arguments: Any) -> float:
        try:
            value = self.function(*arguments)
        except Exception as error:  # of a user's function: whatever it raises
            asked = shown(arguments[0][-1].get("content")) if arguments[0] else "nothing"
            text = f"{type(error).__name__}: {error}"
            raise JudgeError(f"{self.spec} failed at the prompt {asked}, {arguments[-1]}: {text}") from error
        if value is None:
            self.usage.count_unknown("the program gave None")
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise JudgeError(f"{self.spec} gave {shown(value)}; return a number, or None for no score") from None
        if math.isinf(number):
            raise JudgeError(f"{self.spec} gave {number}; return a finite number, or None for no score")
        if math.isnan(number):
            self.usage.count_unknown("the program gave NaN")
        return number

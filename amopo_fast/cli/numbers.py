"""Values of the commands that argparse alone reads: one that cannot be is bad usage, said in one line."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write a whole number, found {text[:40]!r}") from None


def whole(text: str, least: int = 1) -> int:
    """A whole number from `least` on, below 2**63."""
    number = integer(text)
    if not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"write a whole number from {least} on, below 2**63, found {text[:40]}")
    return number


def whole_or_zero(text: str) -> int:
    return whole(text, 0)


def seed(text: str) -> int:
    """0 to 2**32 - 1, which numpy's generators take."""
    number = whole(text, 0)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"write a whole number below 2**32, found {number}")
    return number


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"write a finite number, found {text[:40]!r}")
    return number


def above_zero(text: str) -> float:
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"write a number above 0, found {text!r}")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers between commas."""
    return tuple(finite(part) for part in text.split(","))


def share(text: str) -> float:
    """Above 0, at most 1."""
    number = finite(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"write a number above 0 and at most 1, found {text!r}")
    return number


def mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, found {text[:40]!r}")
    return found


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"write true or false, found {text!r}")
    return text.lower() == "true"

"""How pictures look: colours, line styles, sizes of type, and the numbers at the ticks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Of text, secondary text and grid.
INK, DIM, GRID = "#1d2127", "#626b78", "#dfe2e6"
CONTEXT = "#9aa3ad"  # what stands behind for comparison; visible on light and on dark
ALARM = "#d1495b"


@dataclass(frozen=True)
class Look:
    """How one of several lines is told from the others: by colour, by dashes, by marker."""

    color: str
    dash: Any  # a matplotlib line style
    marker: str


_SOLID, _DASHED, _DOTTED, _MIXED = "-", (0, (5, 1.8)), (0, (1.3, 1.3)), (0, (5, 1.5, 1.3, 1.5))

# Colours of Okabe and Ito (2008), which the common kinds of colour blindness tell apart; slate for their black and
# brown for their yellow, which is lost on white. Any two are at least 16 apart (CIE 1976 colour difference), also as
# protanopes, deuteranopes and tritanopes see them (Machado et al. 2009).
LOOKS = (
    Look("#0072b2", _SOLID, "o"),
    Look("#d55e00", _DASHED, "s"),
    Look("#009e73", _MIXED, "^"),
    Look("#cc79a7", _DOTTED, "D"),
    Look("#e69f00", _SOLID, "v"),
    Look("#56b4e9", _DASHED, "P"),
    Look("#3c4450", _MIXED, "X"),
    Look("#8c3c14", _DOTTED, "*"),
)

# The same on a dark screen: a page replaces them as its reader's screen is (page.py).
ON_DARK = {
    INK: "#e8eaed",
    DIM: "#9aa3b0",
    GRID: "#30353d",
    **dict(zip((look.color for look in LOOKS), (
        "#2f86dd", "#ec6a1c", "#10b58c", "#cf7fb0", "#f5bd3a", "#a5dbff", "#eef0f2", "#a85030"), strict=True)),
}  # fmt: skip

# Inner areas of the markers of several evaluation sets.
FILLS = ("full", "none", "left", "bottom", "right", "top")

_RC = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.labelcolor": DIM,
    "axes.edgecolor": DIM,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.color": INK,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "legend.columnspacing": 1.6,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "svg.fonttype": "none",  # text stays text: it can be searched, and a page's own type may replace it
    "svg.hashsalt": "amopo_fast",  # the same picture has the same bytes
}


def look(number: int) -> Look:
    return LOOKS[number % len(LOOKS)]


def variable(color: str) -> str:
    """The CSS variable that holds a colour of this module in a page."""
    return f"--c{color[1:]}"


@contextmanager
def styled() -> Iterator[None]:
    """Within it a figure is made and written: with these settings, whatever the user's matplotlibrc says."""
    import matplotlib.style

    with matplotlib.style.context(_RC, after_reset=True):
        yield


def shortened(text: str, most: int) -> str:
    """At most `most` characters: the beginning and, because names of runs differ there, more of the end."""
    if len(text) <= most:
        return text
    end = (most - 1) * 2 // 3
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def told_apart(names: Sequence[str], most: int = 24) -> list[str]:
    """The names as they are, or, where one is longer than `most`, without what all have in common.

    The parts between "_" and "/" are compared: place by place if all have as many, else from the beginning.
    """
    if len(names) < 2 or max(map(len, names)) <= most:
        return list(names)
    parts = [re.split("([_/])", name) for name in names]  # every second one is a separator
    columns = list(zip(*parts, strict=False))
    common = [len(set(column)) == 1 for column in columns]
    if len({len(each) for each in parts}) > 1:
        first = common.index(False) if False in common else len(common) - 1
        common = [place < first for place in range(max(map(len, parts)))]
    return [_without(each, common) for each in parts]


def _without(parts: Sequence[str], common: Sequence[bool]) -> str:
    text, left_out = "", False
    for place in range(0, len(parts), 2):
        if common[place]:
            left_out = True
        else:
            text += f"{' ' * bool(text)}… " if left_out else parts[place - 1] * bool(text)
            text, left_out = text + parts[place], False
    return text


def number(value: float) -> str:
    """Three or four digits: 0.2514, 13.4k, 3e-7."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        return _exponent(f"{value:.3g}") if "e" in f"{value:.3g}" else _exponent(f"{value:.2e}")
    return f"{value:.4g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All with the same unit and as many decimals as tell them apart."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if 0 < largest < 1e-3:
        return ["0" if abs(tick) < 1e-9 * largest else _exponent(f"{tick:.2g}") for tick in ticks]
    scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    scaled = [tick / scale for tick in ticks]
    decimals = next((d for d in range(7) if all(abs(round(t, d) - t) < 1e-9 + 1e-6 * abs(t) for t in scaled)), 7)
    return [f"{tick:,.{decimals}f}{unit}" if round(tick, 7) else "0" for tick in scaled]


def _exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text

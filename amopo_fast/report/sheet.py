"""Panels in rows: together on one sheet, or one by one as pictures in a page.

A picture is a list of `Row`s; whoever wants a new one writes a function that returns them. Places are computed in
inches, so panels have one size whatever stands in them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from amopo_fast.report.style import DIM, ON_DARK, shortened, styled, tick_labels, variable

# Inches.
PANEL_WIDTH, PANEL_HEIGHT, LOW_PANEL_HEIGHT = 2.5, 1.75, 1.15
_LEFT, _RIGHT, _TITLE, _TICKS, _X_LABEL, _GAP = 0.66, 0.29, 0.24, 0.2, 0.16, 0.16
_CELL = _LEFT + PANEL_WIDTH + _RIGHT
_HEADING, _LEGEND_LINE, _EDGE = 0.28, 0.19, 0.15
_LONGEST_KEY = 40  # characters

STEPS = "optimizer step"


@dataclass(frozen=True)
class Panel:
    """One axis and what is said about it. `draw` puts marks on a matplotlib Axes and sets its ranges."""

    title: str
    draw: Callable[[Any], None]
    x_label: str = STEPS
    y_label: str = ""
    note: str = ""  # how to read it
    height: float = PANEL_HEIGHT  # of the axes


@dataclass(frozen=True)
class Row:
    """Panels beside each other, under one legend."""

    panels: Sequence[Panel]
    title: str = ""
    detail: str = ""
    continues: bool = False  # the row above it: panels of the same titles, steps and legend


def sheet(rows: Sequence[Row], title: str, subtitle: str = "", foot: str = ""):
    """All rows as one matplotlib Figure; `foot` is the reading instruction at its end."""
    from matplotlib.figure import Figure

    width = _CELL * max(len(row.panels) for row in rows) + 2 * _EDGE
    foot_lines = textwrap.wrap(foot, int(width * 15.5))
    with styled():
        figure = Figure(figsize=(width, 1.0))
        placed = [_Placed(row, [_draw(figure, panel) for panel in row.panels], width) for row in rows]
        for above, below in zip(placed, placed[1:], strict=False):
            above.x_label = not below.row.continues
        head = 0.32 + (0.24 if subtitle else 0)
        height = 2 * _EDGE + head + sum(each.height for each in placed) + 0.16 * len(foot_lines)
        figure.set_size_inches(width, height)
        y = height - _EDGE
        _text(figure, _EDGE, y, shortened(title, int(width * 9)), fontsize=13, fontweight="bold")
        _text(figure, _EDGE, y - 0.3, shortened(subtitle, int(width * 15)), color=DIM, fontsize=9)
        y -= head
        for each in placed:
            each.put(figure, y)
            y -= each.height
        _text(figure, _EDGE, y, "\n".join(foot_lines), color=DIM, fontsize=8, linespacing=1.35)
    return figure


def card(panel: Panel):
    """One panel as a Figure without its title, which a page says itself; its legend is below."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(_CELL, 1.0))
        axis = _draw(figure, panel)
        axis.set_title("")
        legend = _legend([axis], _CELL - 0.1)
        below = 0.1 + _LEGEND_LINE * legend.lines if legend else 0.0
        height = 0.1 + panel.height + _TICKS + _X_LABEL + 0.05 + below
        figure.set_size_inches(_CELL, height)
        _place(figure, axis, 0, height - 0.1 - panel.height, panel.height)
        if legend:
            legend.add(figure, 0.05, below - 0.04)
    return figure


def svg(figure, prefix: str, label: str) -> str:
    """The figure as an <svg> element for a page: its ids begin with `prefix`, its colours are the page's variables."""
    text = StringIO()
    with styled():
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    found = re.search(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>(.*)</svg>", text.getvalue(), re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", found[2], flags=re.DOTALL)
    body = re.sub(r'( id="|url\(#|xlink:href="#)', lambda match: match[0] + prefix, body).replace("xlink:href", "href")
    for color in ON_DARK:
        body = body.replace(color, f"var({variable(color)})")
    return f'<svg viewBox="{found[1]}" role="img" aria-label="{escape(label)}">{body}</svg>'


# Without them a figure's bytes depend on nothing but the figure.
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def _draw(figure, panel: Panel):
    # A figure's height is known once all legends are: axes are put in their place afterwards.
    axis = figure.add_axes((0, 0, 1, 1), label=str(len(figure.axes)))
    panel.draw(axis)
    axis.set_title(panel.title, pad=5)
    axis.set_xlabel(panel.x_label, labelpad=2)
    axis.set_ylabel(panel.y_label + (", log" if axis.get_yscale() == "log" else ""), labelpad=3)
    for side, low, high in ((axis.xaxis, *axis.get_xlim()), (axis.yaxis, *axis.get_ylim())):
        _set_ticks(side, low, high)
    return axis


def _set_ticks(side, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    if isinstance(side.get_major_locator(), FixedLocator):
        return  # named by the panel
    if side.get_scale() == "log":
        for subs in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
            ticks = [t for t in LogLocator(subs=subs).tick_values(low, high) if low <= t <= high]
            if len(ticks) >= 3:
                break
        ticks = ticks[:: -(-len(ticks) // 6)]
        labels = [tick_labels([tick])[0] for tick in ticks]
        side.set_minor_locator(NullLocator())
    else:
        whole = side.axis_name == "x" and side.get_label_text() == STEPS
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
        ticks = [tick for tick in ticks if low <= tick <= high]
        labels = [f"{tick:,.0f}" for tick in ticks] if whole and high < 1e5 else tick_labels(ticks)
    side.set_ticks(ticks, labels)


class _Placed:
    """A row's axes and legend, and where they go."""

    def __init__(self, row: Row, axes: Sequence[Any], width: float):
        self.row, self.axes, self.x_label = row, axes, True
        self.legend = None if row.continues else _legend(axes, width - 2 * _EDGE)
        self._heading = _HEADING if row.title else 0.0
        self._keys = _LEGEND_LINE * self.legend.lines + 0.08 if self.legend else 0.0
        self._titles = 0.06 if row.continues else _TITLE
        self._body = max(panel.height for panel in row.panels)

    @property
    def height(self) -> float:
        """Inches."""
        above = self._heading + self._keys + self._titles
        return above + self._body + _TICKS + (_X_LABEL if self.x_label else 0.0) + _GAP

    def put(self, figure, y: float) -> None:
        """With its upper edge at `y`, inches from the figure's lower edge."""
        from matplotlib.text import Annotation

        if self.row.title:
            heading = _text(figure, _EDGE, y - 0.02, shortened(self.row.title, 90), fontsize=10, fontweight="bold")
            figure.add_artist(Annotation(self.row.detail, (1, 0), (10, 0), xycoords=heading, va="bottom", fontsize=8.5,
                                         textcoords="offset points", color=DIM))  # fmt: skip
        if self.legend:
            self.legend.add(figure, _EDGE, y - self._heading)
        for column, axis in enumerate(self.axes):
            bottom = y - self._heading - self._keys - self._titles - self._body
            _place(figure, axis, _EDGE + column * _CELL, bottom, self._body)
            if self.row.continues:
                axis.set_title("")
            if not self.x_label:
                axis.set_xlabel("")


def _place(figure, axis, left: float, bottom: float, height: float) -> None:
    width, total = figure.get_size_inches()
    axis.set_position(((left + _LEFT) / width, bottom / total, PANEL_WIDTH / width, height / total))


def _text(figure, x: float, y: float, text: str, **options):
    return figure.text(x, y, text, transform=figure.dpi_scale_trans, va="top", ha="left", **options)


@dataclass(frozen=True)
class _Legend:
    handles: list[Any]
    labels: list[str]
    columns: int

    @property
    def lines(self) -> int:
        return -(-len(self.labels) // self.columns)

    def add(self, figure, x: float, y: float) -> None:
        """With its upper left corner at x, y in inches."""
        figure.legend(self.handles, self.labels, loc="upper left", bbox_to_anchor=(x, y), ncols=self.columns,
                      bbox_transform=figure.dpi_scale_trans)  # fmt: skip


def _legend(axes, width: float) -> _Legend | None:
    """What the axes' labelled marks mean, each once, in as few lines as `width` inches allow."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return None
    labels = [shortened(label, _LONGEST_KEY) for label in found]
    widths = [0.062 * len(label) + 0.65 for label in labels]  # inches: text, handle, space
    for lines in range(1, len(labels) + 1):  # a legend is filled column by column
        columns = [widths[begin : begin + lines] for begin in range(0, len(widths), lines)]
        if sum(map(max, columns)) <= width:
            break
    return _Legend(list(found.values()), labels, len(columns))

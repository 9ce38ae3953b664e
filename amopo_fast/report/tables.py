"""Tables of numbers that follow the terminal's width: what does not fit side by side goes below, and nothing is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class NumbersTable:
    """A table whose first `keys` columns name the row and stand before every part of it.

    Names fold where they are longer than a third of the width.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, start = options.max_width, self.keys
        while start < len(self.columns) or start == self.keys:
            end = len(self.columns)
            # One number column at least, however narrow the terminal is.
            while end > start + 1 and self._width(console, options, self._part(start, end, width)) > width:
                end -= 1
            yield self._part(start, end, width)
            if end == len(self.columns):
                return
            start = end

    @staticmethod
    def _width(console: Console, options: ConsoleOptions, table: Table) -> int:
        return console.measure(table, options=options.update(width=10_000, max_width=10_000)).maximum

    def _part(self, start: int, end: int, width: int) -> Table:
        first = start == self.keys
        title = self.title if first else f"{self.title}, continued"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [*range(self.keys), *range(start, end)]
        for index in shown:
            if index < self.keys:
                table.add_column(self.columns[index], overflow="fold", max_width=max(width // 3, 8))
                continue
            numbers = all(_is_number(row[index]) for row in self.rows)
            table.add_column(self.columns[index], justify="right" if numbers else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in shown))
        return table


def _is_number(cell: str) -> bool:
    """Also one with its interval (81.0 ±2.1), and what stands in the place of one."""
    try:
        float(cell.partition(" ")[0].replace(",", "") or "nan")
    except ValueError:
        return cell in ("absent", "None")
    return True

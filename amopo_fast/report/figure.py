"""Pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amopo_fast.report.runs import Run, read_runs
from amopo_fast.report.sheet import NO_METADATA, Row, sheet
from amopo_fast.report.style import styled
from amopo_fast.report.training import definitions, describe, reading, run_rows

KINDS = (".png", ".svg", ".pdf")


def plot_run(run: str | Path, output: str | Path) -> Path:
    """One run's metrics in a file, whose suffix says its kind. Raises as `read_metrics` and `draw_runs`."""
    return draw_runs(read_runs([run]), output)


def draw_runs(runs: Sequence[Run], output: str | Path, trade_off: Sequence[str] = ()) -> Path:
    """The runs' metrics on one sheet; `trade_off` is as in `run_rows`. Raises as `run_rows` and `draw`."""
    return draw(run_rows(runs, trade_off), output, *describe(runs), f"{reading(runs)} {definitions()}")


def draw(rows: Sequence[Row], output: str | Path, title: str, subtitle: str = "", foot: str = "") -> Path:
    """All rows on one sheet, in a file.

    Raises:
        ValueError: the file's suffix is none of KINDS. OSError: it could not be written; nothing is left.
    """
    output = Path(output)
    if output.suffix not in KINDS:
        raise ValueError(f"{output}: no picture can be written as {output.suffix or 'that'}; use {', '.join(KINDS)}")
    figure = sheet(rows, title, subtitle, foot)
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": NO_METADATA, ".pdf": {"CreationDate": None}}.get(output.suffix)
    try:
        with styled():
            figure.savefig(output, dpi=130, metadata=metadata)
    except OSError:
        output.unlink(missing_ok=True)  # half a picture
        raise
    return output

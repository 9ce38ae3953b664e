"""Charts as PNG, SVG or PDF, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amopo_fast.report.panels import Panel, Section, run_sections
from amopo_fast.report.runs import read_runs

# Told apart in grey and with the common kinds of color blindness; light and dark backgrounds take all of them.
PALETTE = ("#4269d0", "#e07b00", "#2a9d6f", "#d1495b", "#8a5cc7", "#7d8597", "#b5851f", "#2aa6c0")
_COLUMNS = 3


def plot_run(run: str | Path, output: str | Path) -> Path:
    """One run's charts in a file, whose suffix says its kind. Raises as `read_metrics`."""
    return draw(run_sections(read_runs([run])), output, Path(run).name)


def draw(sections: Sequence[Section], output: str | Path, title: str) -> Path:
    """All charts of the sections on one sheet.

    Raises:
        ValueError: the file's suffix is no kind of picture that matplotlib writes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output = Path(output)
    panels = [panel for section in sections for panel in section.panels]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=110)
    finally:
        plt.close(figure)
    return output


def _panel(axis, panel: Panel) -> None:
    for series in panel.series:
        color = PALETTE[series.color % len(PALETTE)]
        label = series.name if series.legend else None
        x, y = zip(*series.points, strict=True)
        if series.band:
            steps, low, high = zip(*series.band, strict=True)
            if series.kind == "dots":
                axis.vlines(steps, low, high, color=color, alpha=0.6, linewidth=1.2)
            else:
                axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        if series.kind == "faint":
            axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        else:
            style = "--" if series.dashed else "-" if series.kind == "line" else "none"
            axis.plot(x, y, linestyle=style, color=color, label=label, linewidth=1.6,
                      marker="o" if series.kind == "dots" else None, markersize=4)  # fmt: skip
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlabel(panel.x_label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_ylim(*panel.y_range)
    if panel.x_names:
        axis.set_xticks(range(len(panel.x_names)), panel.x_names)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)

"""The picture of timeline.py: a step's streams and slots, whole and around the middle of its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amopo_fast.memory.timeline import COMPUTE, TO_GPU, TO_HOST, Operation, Timeline
from amopo_fast.memory.work import Work
from amopo_fast.report.style import DIM, GRID, INK, LOOKS, styled

COLORS = {
    "forward": LOOKS[5].color,
    "recomputation": LOOKS[0].color,
    "gradients and update": LOOKS[2].color,
    "head": LOOKS[6].color,
    "weights": LOOKS[1].color,
    "states": LOOKS[4].color,
    "checkpoint": LOOKS[3].color,
}
NAMES = {"weights": "weights, copied", "states": "states, copied", "checkpoint": "checkpoint, copied"}
ZOOMED = 5  # layers


@dataclass(frozen=True)
class Panel:
    title: str
    work: Work
    timeline: Timeline


def lanes_of(timeline: Timeline) -> list[tuple[str, list[tuple[float, float, str]]]]:
    """(name, bars of (begin, seconds, kind)) from the top."""
    lanes = [("GPU", [_bar(each) for each in timeline.operations if each.stream == COMPUTE])]
    for link in (TO_GPU, TO_HOST):
        bars = [_bar(each) for each in timeline.operations if each.link == link and each.stream != COMPUTE]
        lanes.append((link, bars))
    for kind in ("weights", "states"):
        copies = [each for each in timeline.operations if each.kind == kind and each.slot is not None]
        for slot in sorted({each.slot for each in copies}):
            lanes.append((f"{kind}, slot {slot + 1}", _held(timeline, kind, slot)))
    return lanes


def _bar(operation: Operation) -> tuple[float, float, str]:
    return operation.begin, operation.seconds, operation.kind


def _held(timeline: Timeline, kind: str, slot: int) -> list[tuple[float, float, str]]:
    """The slot's copies, and between them nothing or the computation that uses what is there."""
    mine = [each for each in timeline.operations if each.kind == kind and each.slot == slot]
    bars = [_bar(each) for each in mine]  # of all simulated steps: what a step begins with was fetched before
    for fetch in (each for each in mine if each.link == TO_GPU):
        gone = min((each.begin for each in mine if each.begin >= fetch.end), default=timeline.seconds)
        uses = [each for each in timeline.operations if each.stream == COMPUTE and each.seconds
                and fetch.end <= each.begin < gone and _uses(each, fetch)]  # fmt: skip
        bars += [_bar(each) for each in uses]
    return bars


def _uses(operation: Operation, fetch: Operation) -> bool:
    if fetch.kind == "weights":
        return operation.label == fetch.label and operation.kind not in ("head", "checkpoint")
    label = ("layer", operation.label) if isinstance(operation.label, int) else operation.label
    return operation.kind == "gradients and update" and label == fetch.label


def draw(panels: Sequence[Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    with styled():
        heights = [len(lanes_of(panel.timeline)) for panel in panels]
        figure, grid = plt.subplots(
            len(panels), 2, figsize=(12, 0.27 * sum(heights) + 0.75 * len(panels) + 0.5), layout="constrained",
            gridspec_kw={"height_ratios": heights, "width_ratios": (3, 2)},
        )  # fmt: skip
        for (whole, part), panel in zip(grid, panels, strict=True):
            lanes = lanes_of(panel.timeline)
            middle = next(each for each in panel.timeline.operations
                          if each.kind == "recomputation" and each.label == panel.work.layers // 2)  # fmt: skip
            last = panel.timeline.operations[panel.timeline.first :]
            layer = sum(each.seconds for each in last if each.stream == COMPUTE and each.label == middle.label)
            _lanes(whole, lanes, (0, panel.timeline.seconds), 1.0)
            whole.set_title(panel.title)
            whole.set_xlabel("seconds of a step")
            _lanes(part, lanes, (middle.begin, middle.begin + ZOOMED * layer), 1e3)
            part.set_title(f"{ZOOMED} layers of its backward pass")
            part.set_xlabel("milliseconds")
            part.set_yticklabels([])
        kinds = {kind for panel in panels for _, bars in lanes_of(panel.timeline) for _, _, kind in bars}
        keys = [Patch(color=color, label=NAMES.get(kind, kind)) for kind, color in COLORS.items() if kind in kinds]
        figure.legend(handles=keys, loc="outside upper left", ncols=len(keys), labelcolor=INK, borderaxespad=0.6)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _lanes(axis, lanes, span: tuple[float, float], unit: float) -> None:
    for place, (_, bars) in enumerate(lanes):
        for kind, color in COLORS.items():
            shown = [((begin - span[0]) * unit, seconds * unit) for begin, seconds, each in bars
                     if each == kind and begin < span[1] and begin + seconds > span[0]]  # fmt: skip
            axis.broken_barh(shown, (place - 0.36, 0.72), facecolors=color, linewidth=0)
    axis.set_xlim(0, (span[1] - span[0]) * unit)
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_yticks(range(len(lanes)), [name for name, _ in lanes], color=DIM)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=GRID)

"""The pictures beside the tables of tables.py: of the first of the stored reports."""

from __future__ import annotations

from pathlib import Path


def plot_sweeps(reports: list[dict], path: Path) -> None:
    """Rate by axis, one line per variant; every variant is credited with the exact path's 8 N V H FLOP."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in reports[0]["rows"] if "median_ms" in row]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, name in zip(axes, "NHV", strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["case"].startswith(f"{name}="):
                tflops = 8 * row["N"] * row["H"] * row["V"] / row["median_ms"] / 1e9
                lines.setdefault(row["variant"], []).append((row[name], tflops))
        for variant, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=variant)
        axis.set_xscale("log", base=2)
        axis.set_xlabel({"N": "label rows N", "H": "hidden size H", "V": "vocabulary V"}[name])
    axes[0].set_ylabel("8 N V H FLOP / time, TFLOP/s")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_optimizers(reports: list[dict], path: Path) -> None:
    """Loss, and what it is above the float32 run of the same seed: mean and range over seeds, means of 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = [row for row in reports[0]["rows"] if row["status"] == "ok"]
    figure, (loss_axis, above_axis) = plt.subplots(1, 2, figsize=(11, 3.8))
    smooth = np.ones(20) / 20
    full = np.array([np.convolve(each, smooth, "valid") for each in rows[0]["losses"]])
    for number, row in enumerate(rows):
        losses = np.array([np.convolve(each, smooth, "valid") for each in row["losses"]])
        steps = np.arange(losses.shape[1]) + len(smooth)
        for axis, values in ((loss_axis, losses), (above_axis, losses - full)):
            axis.plot(steps, values.mean(0), color=f"C{number}", label=row["variant"], linewidth=1.2)
            axis.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
    loss_axis.set_ylabel("loss")
    above_axis.set_ylabel("loss above float32, same seed")
    for axis in (loss_axis, above_axis):
        axis.set_xlabel("optimizer step")
    above_axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)

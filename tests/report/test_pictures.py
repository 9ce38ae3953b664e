"""What the panels of runs show: the lines, the ranges, and that nothing covers anything."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from amopo_fast.report import marks
from amopo_fast.report.curves import MOST_POINTS, smoothed, thinned
from amopo_fast.report.runs import read_runs
from amopo_fast.report.sheet import Row, card, sheet
from amopo_fast.report.style import CONTEXT, LOOKS, ON_DARK, number, shortened, tick_labels, told_apart
from amopo_fast.report.training import definitions, describe, reading, run_rows

sys.path.insert(0, str(Path(__file__).parent))
from metrics_for_tests import DIMENSIONS, write_run  # noqa: E402

EIGHT = tuple(f"dimension_{i}" for i in range(8))
LONG = "llama-3.1-8b-instruct_lr{}e-7_beta0.8_gamma2.0_helpsteer2_weighting-gaussian_seed{}"


def runs_of(tmp_path, count=1, **options):
    return read_runs([write_run(tmp_path / f"run{i}", shift=0.3 * i, **options) for i in range(count)])


def drawn(rows, row, column):
    axis = Figure().add_axes((0, 0, 1, 1))
    rows[row].panels[column].draw(axis)
    return axis


def lines_of(axis):
    """[(colour, x, y)] of what is drawn in the axis' own units, without the entries of the legend."""
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_transform() == axis.transData]
    return [(to_hex(line.get_color()), np.array(line.get_xdata()), np.array(line.get_ydata())) for line in lines]


# ----- numbers -----


def test_smoothing_is_a_mean_with_gaussian_weights_around_each_point():
    rng = np.random.default_rng(0)
    values = rng.normal(size=300)
    sigma = 10 / 1.349
    index = np.arange(300)
    weights = np.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    expected = weights @ values / weights.sum(1)
    found = smoothed([(3 * i, float(v)) for i, v in enumerate(values)])
    assert [x for x, _ in found] == [3 * i for i in range(300)]
    np.testing.assert_allclose([y for _, y in found], expected, atol=1e-3)
    # A turn stays where it is: halfway up at the step itself.
    turn = smoothed([(i, float(i >= 50)) for i in range(100)])
    assert turn[49][1] < 0.5 < turn[50][1]
    assert turn[49][1] + turn[50][1] == pytest.approx(1)


def test_short_series_are_shown_as_they_are():
    points = [(i, float(i % 3)) for i in range(29)]
    assert smoothed(points) == points and smoothed([]) == []
    assert smoothed(points[:1]) == points[:1]


def test_thinning_keeps_ends_order_and_every_spike():
    rng = np.random.default_rng(1)
    values = rng.normal(size=10_000)
    values[[7, 3333, 9998]] = 50, -50, 60
    points = [(i, float(v)) for i, v in enumerate(values)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS and found[0] == points[0] and found[-1] == points[-1]
    assert {(7, 50.0), (3333, -50.0), (9998, 60.0)} <= set(found)
    steps = [x for x, _ in found]
    assert steps == sorted(set(steps)) and set(found) <= set(points)
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 80  # no stretch is left out
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_numbers_at_ticks_tell_them_apart():
    assert tick_labels([0, 1e-7, 2.5e-7]) == ["0", "1e-7", "2.5e-7"]
    assert tick_labels([0.248, 0.25, 0.2525]) == ["0.2480", "0.2500", "0.2525"]
    assert tick_labels([0, 10_000, 25_000]) == ["0", "10k", "25k"]
    assert tick_labels([-1.0, 0.0, 2500.0]) == ["-1", "0", "2,500"]
    values = (0.0, 0.25, 1234.5, 3e-7, 15_300, 2.5e6)
    assert [number(value) for value in values] == ["0", "0.25", "1234", "3e-7", "15.3k", "2.5M"]


def test_long_names_are_told_apart_by_what_differs():
    names = [LONG.format(i, 40 + i) for i in range(3)]
    assert told_apart(names) == ["… lr0e-7 … seed40", "… lr1e-7 … seed41", "… lr2e-7 … seed42"]
    assert told_apart(["first", "second"]) == ["first", "second"]
    longer = [f"{'x' * 20}_a", f"{'x' * 20}_b_more", f"{'x' * 20}_b"]
    assert told_apart(longer) == ["… a", "… b_more", "… b"]
    assert told_apart(["org/" + "y" * 30, "runs/other/model_1"]) == ["org/" + "y" * 30, "runs/other/model_1"]
    assert shortened("a" * 50 + "end", 20) == "aaaaaaa…aaaaaaaaaend"


# Linear RGB to linear RGB: Machado, Oliveira and Fernandes 2009, table 1, severity 1.
VISION = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_told_apart(vision, dark):
    def lab(color):
        srgb = np.array(to_rgb(color))
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
        x, y, z = np.where((w := xyz / (0.9505, 1, 1.089)) > 0.008856, np.cbrt(w), 7.787 * w + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    colours = [lab(ON_DARK[look.color] if dark else look.color) for look in LOOKS]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]) > 15.9


# ----- panels -----


def test_there_are_eight_kinds_of_panels_and_a_row_for_each_run(tmp_path):
    one = run_rows(runs_of(tmp_path / "one"))
    assert sum(len(row.panels) for row in one) == 8
    three = run_rows(runs_of(tmp_path / "three", 3))
    assert [row.title for row in three] == ["", "run0", "run1", "run2"]
    assert len({panel.title for row in three for panel in row.panels}) == 8
    assert [row.continues for row in three] == [False, False, True, True]
    assert "accuracy" in three[1].detail and "40 optimizer steps" in three[1].detail


def test_training_and_evaluation_are_in_one_panel_and_inside_its_range(tmp_path):
    [run] = runs_of(tmp_path)
    axis = drawn(run_rows([run]), 0, 0)
    raw, smooth, evaluation = (y for _, _, y in lines_of(axis))
    assert raw.tolist() == [y for _, y in run.points("loss")] and len(smooth) == 40
    assert evaluation.tolist() == [y for _, y in run.points("eval_loss")]
    low, high = axis.get_ylim()
    assert low < min(raw.min(), evaluation.min()) and high > max(raw.max(), evaluation.max())
    assert axis.get_legend_handles_labels()[1] == ["training", "evaluation"]


def test_accuracy_has_a_line_a_dimension_in_per_cent(tmp_path):
    [run] = runs_of(tmp_path)
    axis = drawn(run_rows([run]), 1, 0)
    last = {color: y[-1] for color, x, y in lines_of(axis) if len(x) == 40}
    for look, name in zip(LOOKS, DIMENSIONS, strict=False):
        assert last[look.color] == pytest.approx(100 * run.points(f"accuracy/{name}")[-1][1], abs=2)
    assert axis.get_ylim()[0] >= -1.5 and axis.get_ylim()[1] <= 101.5


def test_weights_have_an_axis_around_one_over_k(tmp_path):
    [run] = runs_of(tmp_path, names=EIGHT)
    low, high = drawn(run_rows([run]), 1, 2).get_ylim()
    assert (low + high) / 2 == pytest.approx(1 / 8)
    assert 0.035 / 8 < high - 1 / 8 < 0.045 / 8  # the largest difference is 3.5 %
    [one] = read_runs([write_run(tmp_path / "single", names=("only",))])
    axis = drawn(run_rows([one]), 1, 2)
    assert "weight is 1" in axis.texts[0].get_text()


def test_probabilities_have_an_axis_that_fits_them(tmp_path):
    low, high = drawn(run_rows(runs_of(tmp_path)), 1, 3).get_ylim()
    assert 0 <= low < 0.003 and 0.004 < high < 0.005


def test_rows_of_runs_share_ranges_and_a_dimension_keeps_its_colour(tmp_path):
    a = write_run(tmp_path / "a", names=("x", "y", "z"))
    b = write_run(tmp_path / "b", names=("x", "z"), shift=2.0)
    rows = run_rows(read_runs([a, b]))
    for column in (0, 1, 3):
        axes = [drawn(rows, row, column) for row in (1, 2)]
        assert axes[0].get_ylim() == axes[1].get_ylim()
        shown = np.concatenate([y for axis in axes for _, _, y in lines_of(axis)])
        assert axes[0].get_ylim()[0] <= shown.min() and shown.max() <= axes[0].get_ylim()[1]
    handles, labels = drawn(rows, 2, 0).get_legend_handles_labels()
    assert {label: handle.get_color() for handle, label in zip(handles, labels, strict=True)} == {
        "x": LOOKS[0].color, "z": LOOKS[2].color,
    }  # fmt: skip
    assert not rows[2].continues  # another legend
    behind = [y for color, _, y in lines_of(drawn(rows, 2, 1)) if color == CONTEXT]
    assert len(behind) == 1 and behind[0][-1] == pytest.approx(read_runs([a])[0].points("margin/mean")[-1][1], abs=0.1)


def test_speed_and_memory_of_several_runs_is_a_point_each(tmp_path):
    runs = runs_of(tmp_path, 2)
    axis = drawn(run_rows(runs), 0, 3)
    points = [(x[0], y[0]) for _, x, y in lines_of(axis)]
    assert [x for x, _ in points] == [pytest.approx(61.0), pytest.approx(61.3)]
    rates = [y for _, y in runs[0].points("tokens_per_second/computed")]
    assert points[0][1] == pytest.approx(np.median(rates))


def test_numbers_that_are_not_finite_are_crosses_and_leave_the_range_alone(tmp_path):
    [run] = runs_of(tmp_path, not_finite=(10, 30))
    assert run.not_finite("loss") == run.not_finite("grad_norm") == [10, 30]
    assert [step for step, _ in run.points("grad_norm")][8:10] == [9, 11]
    for column in (0, 1):
        axis = drawn(run_rows([run]), 0, column)
        [crosses] = [line for line in axis.get_lines() if line.get_label() == "not a finite number"]
        assert list(crosses.get_xdata()) == [10, 30] and all(map(math.isfinite, axis.get_ylim()))
    [lost] = read_runs([write_run(tmp_path / "lost", 5, not_finite=range(6))])
    assert drawn(run_rows([lost]), 0, 1).texts[0].get_text() == "no finite value"


def test_a_spike_makes_the_axis_logarithmic_and_says_so():
    axis = Figure().add_axes((0, 0, 1, 1))
    marks.fit_y(axis, [1.0] * 20 + [29.0], log=True)
    assert axis.get_yscale() == "linear"
    marks.fit_y(axis, [1.0] * 20 + [31.0], log=True)
    assert axis.get_yscale() == "log" and axis.get_ylim()[1] > 31


def test_one_step_is_seen(tmp_path):
    rows = run_rows(runs_of(tmp_path, steps=1))
    for row in (0, 1):
        for column in range(4):
            axis = drawn(rows, row, column)
            shown = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
            assert shown and all(line.get_marker() not in ("None", "", None) for line in shown), (row, column)
            assert axis.get_ylim()[0] < axis.get_ylim()[1]
    assert "as logged" in reading(runs_of(tmp_path / "again", steps=1)) and "smoothed" not in reading(
        runs_of(tmp_path / "more", steps=1)
    )


def test_a_missing_metric_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    rows = run_rows(read_runs([tmp_path]))
    for row, column in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)):
        assert drawn(rows, row, column).texts[-1].get_text() == "not logged", (row, column)


def test_intervals_are_drawn_where_they_are_known():
    value = {"value": 0.5, "low": 0.1, "high": 0.9}
    few, absent = {**value, "low": None, "high": None}, {"value": None, "low": None, "high": None}
    for values, lines in (([few, few], 1), ([few, value], 2), ([value, value], 3)):
        axis = Figure().add_axes((0, 0, 1, 1))
        marks.intervals(axis, [0, 1], values, LOOKS[0])
        assert len(axis.get_lines()) == lines
        assert (0.9 in marks.bounds(values)) == (lines > 1)
    assert marks.bounds([absent]) == []


# ----- the sheet -----


@pytest.mark.parametrize("case", ["one", "eight dimensions", "eight long runs"])
def test_nothing_covers_anything(tmp_path, case):
    names = EIGHT if case == "eight dimensions" else DIMENSIONS
    folders = [LONG.format(i, i) for i in range(8)] if "long" in case else ["run"]
    runs = read_runs([write_run(tmp_path / name, 12, names=names, sets=("eval_a_", "eval_b_")) for name in folders])
    figure = sheet(run_rows(runs), *describe(runs), f"{reading(runs)} {definitions()}")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.size
    panels = [axis.get_tightbbox(renderer) for axis in figure.axes]
    around = [*figure.legends, *figure.texts, *(child for child in figure.artists if hasattr(child, "get_text"))]
    others = [item.get_window_extent(renderer) for item in around if not hasattr(item, "get_text") or item.get_text()]
    for box in panels + others:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, box
    everything = panels + others
    for place, box in enumerate(everything):
        for other in everything[place + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or along <= 1, (box, other)


def test_a_card_holds_its_legend_below_the_panel(tmp_path):
    rows = run_rows(runs_of(tmp_path, names=EIGHT, steps=12))
    figure = card(rows[1].panels[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    [legend] = [each.get_window_extent(renderer) for each in figure.legends]
    assert legend.y0 >= 0 and legend.y1 <= figure.axes[0].get_tightbbox(renderer).y0
    assert legend.x1 <= figure.bbox.width and figure.axes[0].get_title(loc="left") == ""


def test_panels_of_one_picture_have_one_size(tmp_path):
    rows = run_rows(runs_of(tmp_path, steps=12))
    figure = sheet([*rows, Row(rows[0].panels[:1])], "t")
    sizes = {tuple(np.round(axis.get_position().size * figure.get_size_inches(), 6)) for axis in figure.axes}
    assert len(figure.axes) == 9 and len(sizes) == 1

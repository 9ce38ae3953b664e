"""The Pareto picture: which runs nothing surpasses, where a run stands, and what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np

from amopo_fast.cli import main
from amopo_fast.report.runs import read_runs
from amopo_fast.report.trade_off import front, trade_off_row

sys.path.insert(0, str(Path(__file__).parent))
from metrics_for_tests import write_run  # noqa: E402

NAMES = ("correctness", "brevity")


def test_the_front_is_what_no_other_surpasses():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (0.5, 5.0), (3.0, 1.0), (2.9, 0.9), (3.0, 1.0)]
    assert front(points) == [(1.0, 5.0), (2.0, 4.0), (3.0, 1.0)]


def drawn(folders):
    """By panel, the points of the front's line and of each run."""
    from matplotlib.figure import Figure

    found = {}
    for panel in trade_off_row(read_runs(folders), *NAMES).panels:
        axis = Figure().add_subplot()
        panel.draw(axis)
        lines = [list(zip(*line.get_data(), strict=True)) for line in axis.get_lines() if len(line.get_xdata())]
        found[panel.title.split(",")[0]] = lines[-1], [point for line in lines[:-1] for point in line]
        assert lines[-1][0][0] == axis.get_xlim()[0] and lines[-1][-1][1] == axis.get_ylim()[0]
    return found


def with_last(folder, **values):
    """A run whose last evaluation has these numbers."""
    write_run(folder, 8, names=NAMES)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {f"eval_{name.replace('__', '/')}": value for name, value in values.items()}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    return folder


def test_a_run_stands_where_its_last_evaluation_is(tmp_path):
    runs = [
        with_last(tmp_path / name, accuracy__correctness=x, accuracy__brevity=y, margin__correctness=m)
        for name, x, y, m in (("a", 0.9, 0.6, 1.0), ("b", 0.7, 0.8, 2.0), ("c", 0.6, 0.55, 3.0))
    ]
    line, points = drawn(runs)["Accuracy"]
    np.testing.assert_allclose(points, [(90, 60), (70, 80), (60, 55)])
    np.testing.assert_allclose(line[1:-1], [(70, 80), (70, 60), (90, 60)])
    line, points = drawn(runs)["Margin"]
    assert [x for x, _ in points] == [1.0, 2.0, 3.0] and line[1][0] == 3.0  # brevity's margin is the same in all


def test_without_evaluations_training_counts(tmp_path):
    runs = [write_run(tmp_path / name, 8, names=NAMES, sets=(), shift=shift) for name, shift in (("a", 0), ("b", 1))]
    _, points = drawn(runs)["Margin"]
    last = [[run.smooth(f"margin/{name}")[-1][1] for name in NAMES] for run in read_runs(runs)]
    np.testing.assert_allclose(points, last)


def test_the_command_draws_it_and_refuses_what_it_cannot_draw(tmp_path, capsys):
    one, two = (str(write_run(tmp_path / name, 8, names=NAMES, shift=s)) for name, s in (("a", 0), ("b", 1)))
    assert main(["plot", one, two, "--trade_off", *NAMES, "--formats", "svg", "html"]) == 0
    assert "Trade-off" in (tmp_path / "a" / "metrics.svg").read_text()
    assert len(re.findall("<figure", (tmp_path / "a" / "report.html").read_text())) == 4 + 2 + 2 * 4
    for arguments, message in (
        ([one, "--trade_off", *NAMES], "name at least two"),
        ([one, two, "--trade_off", "brevity", "brevity"], "names brevity twice"),
        ([one, two, "--trade_off", "brevity", "tone"], "a has no dimension tone; it logged correctness, brevity"),
    ):
        capsys.readouterr()
        assert main(["plot", *arguments]) == 1
        assert message in capsys.readouterr().err

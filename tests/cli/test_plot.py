"""Charts and pages of metrics files."""

import json
import re
from html.parser import HTMLParser

import pytest

from amopo_fast.cli import main
from amopo_fast.report.figure import draw
from amopo_fast.report.panels import Panel, Section, Series, run_sections
from amopo_fast.report.runs import read_runs, smoothed
from amopo_fast.report.svg import chart

DIMENSIONS = ("no_object", "<b>odd & name</b>")


def write_run(folder, steps=40, shift=0.0, sets=("eval_",)):
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / steps, "loss": 1 / step + shift, "learning_rate": 1e-7 * step}
        line |= {"accuracy/mean": 0.5, "margin/mean": step / 10, "tokens_per_second/computed": 1e5 + step}
        line |= {"memory/peak_gib": 3.0, "grad_norm": float("nan") if step == 3 else 1.0}
        for name in DIMENSIONS:
            line |= {f"margin/{name}": step / 10, f"accuracy/{name}": 0.5, f"weight/{name}": 0.5}
            for side in ("chosen", "rejected"):
                line |= {f"prob_mean_{side}/{name}": 0.5, f"prob_std_{side}/{name}": 0.7}
        lines.append(line)
        if step % 20 == 0:
            for prefix in sets:
                held = {"step": step, f"{prefix}loss": 0.4, f"{prefix}margin/mean": 1.0, f"{prefix}accuracy/mean": 0.7}
                lines.append(held | {f"{prefix}margin/{name}": 1.0 for name in DIMENSIONS})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Checker(HTMLParser):
    """Every element is closed in order; records what the page would fetch."""

    VOID = {"meta", "br", "line", "circle", "polyline", "polygon"}

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.found = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_plot_draws_one_run_and_several(tmp_path, capsys):
    a = write_run(tmp_path / "a" / "run", sets=("eval_own_", "eval_other_"))
    b = write_run(tmp_path / "b" / "run", 60, 0.5)
    assert main(["plot", str(a)]) == 0
    assert main(["plot", str(a), str(b), "--output", str(tmp_path / "both")]) == 0
    for folder in (a, tmp_path / "both"):
        assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
        assert b"<svg" in (folder / "metrics.svg").read_bytes()[:2000]
        checker = Checker()
        text = (folder / "report.html").read_text()
        checker.feed(text)
        assert not checker.open and not checker.fetched and not re.search(r"https?://|@import|url\(", text)
        assert checker.found.count("svg") == checker.found.count("figure") >= 8
        assert "<b>odd" not in text and "&lt;b&gt;odd &amp; name" in text  # a dimension's name is no markup
    both = (tmp_path / "both" / "report.html").read_text()
    assert "a/run" in both and "b/run" in both
    one = (a / "report.html").read_text()
    assert "accuracy on own" in one and "accuracy on other" in one
    assert "\n".join(capsys.readouterr().out.split()).count("report.html") == 2


def test_a_metric_that_is_not_finite_is_left_out(tmp_path):
    [run] = read_runs([write_run(tmp_path / "run")])
    assert [step for step, _ in run.points("grad_norm")][:3] == [1, 2, 4]
    assert run.dimensions == list(DIMENSIONS)
    for section in run_sections([run]):
        for panel in section.panels:
            assert "nan" not in chart(panel)


def test_every_point_is_inside_the_drawing():
    points = [(step, step**3 * 1e-9) for step in range(2000)]
    drawn = chart(Panel("t", [Series("s", points, 0, band=[(x, y - 1, y + 1) for x, y in points])]))
    for group in re.findall(r'points="([^"]*)"', drawn):
        pairs = [tuple(map(float, pair.split(","))) for pair in group.split()]
        assert len(pairs) <= 1200 and all(0 <= x <= 440 and 0 <= y <= 250 for x, y in pairs)
    assert chart(Panel("t", [Series("s", [(3, 0.0)], 0, "dots")]))  # one point, no extent


def test_smoothing_keeps_a_constant_and_the_first_value():
    assert smoothed([(0, 2.0), (1, 2.0)]) == [(0, 2.0), (1, pytest.approx(2.0))]
    assert smoothed([(5, 1.0), (6, 0.0)])[0] == (5, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; give the output_dir"),
        ("", "no lines yet"),
        ('{"step": 1, "loss"', "no lines yet"),
        ('{"loss": 1}\n{"step": 2}\n', "line 1: no JSON object with a step"),
        ("[]\n{}\n", "line 1"),
        ('{"step": 2}\n', "no metric that could be drawn"),
    ],
)
def test_broken_metrics_end_with_a_sentence(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["plot", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_twice_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "run"))
    assert main(["plot", run, run]) == 1
    assert "twice" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(ValueError):
        draw([Section("s", [Panel("t", [Series("a", [(0, 1.0), (1, 2.0)], 0)])])], tmp_path / "x.doc", "t")

"""`amopo-fast plot`: the files it writes, what a page holds, what is refused, and what is imported for it."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from amopo_fast.cli import main
from amopo_fast.report.figure import draw, plot_run
from amopo_fast.report.sheet import Panel, Row

sys.path.insert(0, str(Path(__file__).parent))
from metrics_for_tests import write_run  # noqa: E402


class Checker(HTMLParser):
    """Every element is closed in order; records ids, what refers to them, and what the page would fetch."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.found, self.ids, self.used = [], [], [], [], []
        self.feed(text)
        self.used += re.findall(r"url\(#([^)]*)\)", text)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                (self.used if value.startswith("#") else self.fetched).append(value.lstrip("#"))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def plotted(tmp_path_factory):
    """{"one": folder of a plotted run, "both": folder of the comparison of it with another}, and what was printed."""
    folder = tmp_path_factory.mktemp("plots")
    one = write_run(folder / "a" / "run", sets=("eval_own_", "eval_other_"))
    other = write_run(folder / "b" / "run", 60, shift=0.5)
    assert main(["plot", str(one)]) == 0
    assert main(["plot", str(one), str(other), "--output_dir", str(folder / "both")]) == 0
    return {"one": one, "both": folder / "both"}


@pytest.mark.parametrize(("which", "panels"), [("one", 8), ("both", 4 + 2 * 4)])
def test_plot_writes_png_svg_and_a_page(plotted, which, panels):
    folder = plotted[which]
    assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    drawn = ElementTree.parse(folder / "metrics.svg").getroot()
    words = "".join(drawn.itertext())
    assert "Accuracy" in words and "<b>odd & name</b>" in words  # text is text
    text = (folder / "report.html").read_text()
    page = Checker(text)
    assert not page.open and not page.fetched and not re.search(r"https?://|@import", text)
    assert page.found.count("svg") == page.found.count("figure") == panels
    assert len(set(page.ids)) == len(page.ids) and set(page.used) <= set(page.ids) and page.used
    assert "<b>odd" not in text and "&lt;b&gt;odd &amp; name" in text  # a dimension's name is no markup
    assert not re.search(r'[ "]nan|inf[" ]', text)


def test_a_page_names_runs_and_evaluation_sets(plotted):
    both = (plotted["both"] / "report.html").read_text()
    assert "a/run" in both and "b/run" in both
    one = (plotted["one"] / "report.html").read_text()
    assert "accuracy on own" in one and "accuracy on other" in one and "evaluation: other" in one


def test_a_page_follows_the_readers_screen(plotted):
    text = (plotted["one"] / "report.html").read_text()
    used = set(re.findall(r"var\((--c[0-9a-f]{6})\)", text))
    light, dark = text.split("prefers-color-scheme:dark", 1)
    assert len(used) >= 5 and all(f"{name}:#" in light and f"{name}:#" in dark for name in used)


def test_a_picture_is_the_same_every_time_whatever_the_users_style(tmp_path):
    import matplotlib

    run = write_run(tmp_path / "run", 12)
    first = plot_run(run, tmp_path / "first.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.facecolor": "black", "text.usetex": True}):
        assert plot_run(run, tmp_path / "second.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; give the output_dir"),
        ("", "holds no whole line"),
        ('{"step": 1, "loss"', "holds no whole line"),
        ('{"loss": 1}\n{"step": 2}\n', "line 1: no JSON object with a step"),
        ("[]\n{}\n", "line 1"),
        ('{"step": 2}\n', "no metric that could be drawn"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "html"])
def test_broken_metrics_end_with_a_sentence(tmp_path, capsys, text, message, kind):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["plot", str(tmp_path), "--formats", kind]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_twice_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "run"))
    assert main(["plot", run, run]) == 1
    assert "twice" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x.doc: no picture can be written as .doc; use .png"):
        draw([Row([Panel("t", lambda axis: None)])], tmp_path / "x.doc", "t")


def test_matplotlib_is_imported_when_something_is_drawn_and_pyplot_never(tmp_path):
    run = write_run(tmp_path / "run", 3)
    code = f"""
import sys
import amopo_fast.report.figure as figure, amopo_fast.report.evaluation, amopo_fast.report.page
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{"matplotlib", "torch", "transformers"}}, loaded
own = [name for name in sys.modules if name.startswith("amopo_fast.") and not name.startswith("amopo_fast.report")]
assert not own, own
figure.plot_run({str(run)!r}, {str(tmp_path / "metrics.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

"""The page of evaluations: intervals where there are enough pairs, and the panels."""

import re

import pytest
from matplotlib.figure import Figure

from amopo_fast.report.evaluation import evaluation_page, evaluation_rows
from amopo_fast.report.style import LOOKS

NAMES = ("no_object", "a_long_name")


def interval(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(pairs, accuracy, step=None, *, names=NAMES, absent=()):
    """A summary as `eval` makes it, of `pairs` pairs."""
    lost = {"value": None, "low": None, "high": None}

    def within(value, half):
        return interval(value, half) if pairs >= 10 else {**lost, "value": value}

    e = {
        "pairs": pairs,
        "prompts": pairs,
        "step": step,
        "mean": {
            "accuracy": within(accuracy, 0.1), "preference_accuracy": within(accuracy, 0.1),
            "margin": within(accuracy - 1, 0.2),
        },  # fmt: skip
        "dimensions": {},
        "by_length": [
            {"from": -40, "to": -1, "pairs": pairs // 2, "accuracy": within(accuracy - 0.05, 0.15)},
            {"from": 0, "to": 60, "pairs": pairs - pairs // 2, "accuracy": within(accuracy + 0.05, 0.15)},
        ],
        "agreement": {
            "same_side": [[1.0] * len(names)] * len(names),
            "margin_correlation": [[None] * len(names)] * len(names),
        },
        "probabilities": {"edges": [0.0, 0.5, 1.0]},
    }
    for index, name in enumerate(names):
        e["dimensions"][name] = {
            "pairs": 0 if name in absent else pairs,
            "tied": 1,
            "reversed": 2,
            "accuracy": lost if name in absent else within(accuracy - 0.02 * index, 0.1),
            "preference_accuracy": lost if name in absent else within(accuracy, 0.1),
            "rank_correlation": lost if name in absent else within(0.3, 0.1),
            "calibration": None if name in absent else {"error": 0.07, "bins": []},
            "margin": lost if name in absent else within(accuracy - 1, 0.2),
            "weight": {"edges": [0.4, 0.5, 0.6], "counts": [0, 0] if name in absent else [pairs - 1, 1]},
        }
        e["probabilities"][name] = {"chosen": [10, 90], "rejected": [40, 60]}
    return e


def drawn(rows, title):
    [panel] = [panel for row in rows for panel in row.panels if panel.title == title]
    axis = Figure().add_axes((0, 0, 1, 1))
    panel.draw(axis)
    return axis


def blue(axis):
    """The marks of the first model or dimension."""
    return [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_color() == LOOKS[0].color]


def test_no_interval_of_a_few_pairs():
    few = evaluation_page("Evaluation", {"base": evaluation(9, 0.6)})
    assert "60.0 %" in few and not re.search(r"\d to \d", few)
    enough = evaluation_page("Evaluation", {"base": evaluation(10, 0.6)})
    assert "50.0 to 70.0" in enough
    for pairs, lines in ((9, 1), (10, 1 + 3)):
        axis = drawn(evaluation_rows({"base": evaluation(pairs, 0.6)}), "Accuracy")
        assert len(blue(axis)) == lines


def test_a_change_is_shown_with_its_interval():
    second = evaluation(20, 0.7) | {"difference": {name: interval(0.1, 0.04) for name in ("mean", *NAMES)}}
    page = evaluation_page("Evaluation", {"base": evaluation(20, 0.6), "trained": second})
    assert "Change in accuracy since base" in page and "+6.0 to +14.0" in page


def test_checkpoints_are_drawn_over_training_and_beside_each_other():
    checkpoints = {f"checkpoint-{step}": evaluation(50, 0.5 + step / 100, step) for step in (10, 20, 30)}
    rows = evaluation_rows({"base": evaluation(50, 0.4), **checkpoints})
    assert len([panel for row in rows for panel in row.panels]) == 7
    [line] = [line for line in blue(drawn(rows, "Accuracy over training")) if len(line.get_xdata()) == 3]
    assert line.get_ydata().tolist() == pytest.approx([60, 70, 80])
    assert line.get_xdata().tolist() == pytest.approx([10, 20, 30], abs=0.3)
    labels = drawn(rows, "Accuracy").get_legend_handles_labels()[1]
    assert labels == ["base", "checkpoint-10", "checkpoint-30"]  # those between are over training
    names = [text.get_text() for text in drawn(rows, "Accuracy by length").texts]
    assert names == ["-40 to -1 tokens: 25 pairs", "+0 to +60 tokens: 25 pairs"]


def test_absent_dimensions_and_names_that_are_markup():
    names = ("no_object", "<i>x</i>")
    page = evaluation_page("Evaluation", {"<b>": evaluation(20, 0.6, names=names, absent=("<i>x</i>",))})
    assert "<b>" not in page and "<i>x" not in page and "&lt;i&gt;x&lt;/i&gt;" in page
    assert "absent" in page and not re.search(r'[ ">]nan', page)


def test_one_dimension_has_no_weights_to_draw():
    rows = evaluation_rows({"base": evaluation(20, 0.6, names=("only",))})
    assert "weight is 1" in drawn(rows, "Weights").texts[0].get_text()


def test_of_many_models_the_first_and_the_last_are_drawn():
    rows = evaluation_rows({f"model{i}": evaluation(20, 0.5 + i / 100) for i in range(12)})
    labels = drawn(rows, "Margin").get_legend_handles_labels()[1]
    assert labels == ["model0", *(f"model{i}" for i in range(5, 12))]
    assert rows[0].panels[0].note == "8 of 12 models."

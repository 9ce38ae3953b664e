"""Tables on a terminal: as wide as it is, and no name or number is cut."""

import io
import re

import pytest
from rich.console import Console

from amopo_fast.cli.evaluate import _print
from amopo_fast.survival.failed_step import FailedStep

COLUMNS = ("logp_chosen", "logp_rejected", "margin", "weight", "prob_std_chosen", "prob_std_rejected")
VALUES = {column: -1.2345e-3 * (number + 1) for number, column in enumerate(COLUMNS)}
STEP = {
    "step": 3, "reason": "the loss is nan", "records": [7], "learning_rate": 0.25, "gradient_norm": None, "seed": 1,
    "pairs": [{"record": 7, "rank": 0, "micro_batch": 12, "micro_batch_loss": 0.123456,
               "dimensions": {"instruction_following": VALUES, "no_object": VALUES}}],
}  # fmt: skip
INTERVAL = {"accuracy": {"value": 0.8125, "low": 0.79, "high": 0.83}}
NAMES = ["no_object", "helpfulness", "correctness", "instruction_following"]
RESULT = {"pairs": 240, "mean": INTERVAL, "dimensions": dict.fromkeys(NAMES, INTERVAL)}


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_failed_steps_numbers_are_whole_at_every_width(width):
    out = io.StringIO()
    Console(width=width, file=out).print(FailedStep(STEP).table())
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for value in VALUES.values():
        assert len(re.findall(rf"{value:.4g}\b", text)) == 2
    assert ("continued" in text) == (width < 200)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_an_evaluations_intervals_are_whole_at_every_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    _print({"": {"a/model/of/a/long/name": RESULT, "another": RESULT}})
    text = capsys.readouterr().out
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("81.2 ±2.2") == 10

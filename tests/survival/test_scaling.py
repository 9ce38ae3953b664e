"""docs/scaling.md holds the tables of its JSON, and the formulas hold what is said about them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_the_json(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text()
    for name, table in scaling.tables(json.loads(scaling.RESULTS.read_text())).items():
        assert table in page, f"{name}: run benchmarks/scaling.py --tables and paste it into docs/scaling.md"


def test_communication_of_a_micro_batch(scaling):
    billion = int(1e9)
    received, seconds = scaling.communication(32 * billion, 32 * billion, 64, 8)
    assert received == pytest.approx(8 * 32e9 * 7 / 8)
    assert seconds == pytest.approx(received / 450e9 + 3 * 64 * 7 * 10e-6)
    adapters, _ = scaling.communication(32 * billion, 0, 64, 8)
    assert adapters == received / 2
    assert scaling.break_even_tokens(0.4 * 989e12) == pytest.approx(989)
    assert scaling.break_even_tokens(0.4 * 989e12, card=12.5e9) == pytest.approx(3956)


def test_the_json_is_what_the_estimator_says_now(scaling):
    row = next(
        row for row in json.loads(scaling.RESULTS.read_text())["rows"]
        if (row["model"], row["setup"], row["gpus"], row["tokens"])
        == ("Qwen2.5-32B", "8-bit AdamW, bf16 weights", 64, 2048)
    )  # fmt: skip
    import dataclasses

    setup = dataclasses.replace(scaling.SETUPS[row["setup"]], gpus=64, liger=True)
    now = scaling.estimate(scaling.MODELS[row["model"]], scaling.row_of(2048), setup)
    assert now.needed / 2**30 == pytest.approx(row["memory_gib"], rel=0.02)

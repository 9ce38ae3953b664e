"""The step on real pairs: equal loss and gradients on equal tokens, on a tiny model and the installed TRL."""

import json
import sys
from pathlib import Path

import pytest
from demo_folder import demo_folder

from amopo_fast.demo.data import HELDOUT_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import real_step  # noqa: E402


@pytest.mark.slow  # TRL is imported
def test_variants_agree_on_equal_tokens(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    demo_folder(tmp_path / "model")
    pairs = [json.loads(line) for line in HELDOUT_FILE.read_text().splitlines()[:6]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["real_step.py", "--device", "cpu", "--rounds", "1", "--out", str(out), "--model",
                                      str(tmp_path / "model"), "--data", str(tmp_path / "pairs.json")])  # fmt: skip
    real_step.main()
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert all(row["status"] == "ok" for row in rows.values()) and len(rows) == 5
    for one, other in (("reference way", "ours, dimension_first"), ("TRL CPOTrainer, simpo", "ours, TRL's tokens")):
        assert rows[other]["loss"] == pytest.approx(rows[one]["loss"], rel=1e-5)
        assert rows[other]["gradient_error"] < 1e-4
        assert rows[other]["computed_tokens"] < rows[one]["computed_tokens"]
    assert rows["TRL CPOTrainer, simpo"]["extra_labels"] > 0

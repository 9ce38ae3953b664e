"""Settings on a pretrained model: what a trial changed in the held-out pairs, and that it goes on where it ended."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_folder import demo_folder

from amopo_fast.demo.data import HELDOUT_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import real_settings  # noqa: E402
from real_model_summary import Judged  # noqa: E402


class Bench:
    """Says of every model what it was told."""

    def __init__(self, judged):
        self.judged = lambda model, pairs: {"judged": judged}


def test_what_training_changed():
    def pair(chosen, rejected):  # sums over 4 and 2 tokens, of two dimensions
        return {"tokens": [4, 2], "logps": [[4 * c, 2 * r] for c, r in zip(chosen, rejected, strict=True)]}

    before = Judged([{"judged": {"0": pair((-1, -2), (-2, -2)), "1": pair((-3, -3), (-1, -2))}}])
    now = {"0": pair((-1, -1), (-2, -3)), "1": pair((-3, -4), (-1, -2))}
    found = real_settings.changed(Bench(now), None, [], before)
    # Differences were (1, 0) and (-2, -1), and are (1, 2) and (-2, -2).
    assert found["difference"]["value"] == pytest.approx(0.25)  # of 1 and -0.5
    assert found["moved_right"] == 0.5
    assert found["logp_chosen"]["value"] == pytest.approx(0.0)  # of 0.5 and -0.5
    assert found["preferred"] == [0.5, 0.5]
    losses = [np.log1p(np.exp(1 - 5 * np.array(d))).mean() for d in ((1, 0, -2, -1), (1, 2, -2, -2))]
    assert found["loss_at_beta_5_gamma_1"] == pytest.approx(losses, abs=1e-4)


def test_it_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    demo_folder(tmp_path / "model")
    pairs = [json.loads(line) for line in HELDOUT_FILE.read_text().splitlines()[:24]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv",
        ["real_settings.py", "--smoke", "--device", "cpu", "--model", str(tmp_path / "model"),
         "--pairs", str(tmp_path / "pairs.json"), "--out", str(out)],
    )  # fmt: skip
    real_settings.main()
    rows = json.loads(out.read_text())["rows"]
    lora, everything = [row for row in rows if "heldout" in row]
    assert (lora["trained"], lora["steps"], len(lora["heldout"])) == ("LoRA", 1, 1)
    assert (everything["trained"], everything["steps"], len(everything["heldout"])) == ("all weights", 6, 2)
    first, second = (each["difference"]["value"] for each in everything["heldout"])
    assert first != second and first != 0  # all weights moved, in both epochs
    kept = json.loads(out.read_text())
    kept["rows"] = [row for row in kept["rows"] if row is not kept["rows"][-1]]
    for row in kept["rows"]:
        row["cpu_seconds"] = -1.0
    out.write_text(json.dumps(kept))
    real_settings.main()
    again = json.loads(out.read_text())["rows"]
    assert [row["cpu_seconds"] == -1.0 for row in again if "heldout" in row] == [True, False]
    assert again[-1]["heldout"] == everything["heldout"]

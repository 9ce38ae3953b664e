"""The comparison on a pretrained model: its numbers from made-up judgements, and that it goes on where it ended."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_folder import demo_folder

from amopo_fast.demo.data import HELDOUT_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import real_model  # noqa: E402
import real_model_summary as summary  # noqa: E402

NAMES = ["no_object", "helpfulness"]
TOKENS = (4, 2)


def row(case, seed, differences, low=None):
    """A method's row: l_chosen - l_rejected by record and dimension, l_rejected is -1."""

    def judged(found):
        return {
            record: {"tokens": list(TOKENS), "logps": [[TOKENS[0] * (d - 1), -TOKENS[1]] for d in each]}
            for record, each in found.items()
        }

    rest = {} if case == summary.BEFORE else {"steps": 3, "computed_tokens": 9, "learning_rate": 0.1,
                                              "loss_first": 1.0, "loss_last": 0.5}  # fmt: skip
    return {"case": case, "seed": seed, "judged": judged(differences), "asked_low": judged(low or differences), **rest}


def rows_of(method_differences, gaps):
    data = {"case": "data", "dimensions": NAMES, "methods": dict.fromkeys(method_differences), "score_gaps": gaps}
    before = [row(summary.BEFORE, seed, {record: [-1.0, -1.0] for record in gaps if int(record) % 2 == seed})
              for seed in (0, 1)]  # fmt: skip
    return [data, *before, *(
        row(method, seed, {r: each for r, each in found.items() if int(r) % 2 == seed}, low)
        for method, (found, low) in method_differences.items() for seed in (0, 1)
    )]  # fmt: skip


def test_numbers_of_made_up_judgements():
    gaps = {"0": [1.0], "1": [0.0], "2": [-2.0], "3": [1.0]}
    simpo = {"0": [1.0, 2.0], "1": [1.0, 1.0], "2": [-1.0, -1.0], "3": [-1.0, 3.0]}
    other = {"0": [1.0, -1.0], "1": [1.0, 1.0], "2": [1.0, 1.0], "3": [1.0, 3.0]}
    low = {record: [d - 0.25 for d in each] for record, each in other.items()}
    rows = rows_of({"SimPO": (simpo, None), "other": (other, None)}, gaps)
    for each in rows:
        if each["case"] == "other":
            each["asked_low"] = row("other", 0, {r: low[r] for r in each["judged"]})["judged"]
    found = summary.summarise(rows)
    methods = found["methods"]
    assert (found["pairs"], found["seeds"], found["untied"]) == (4, 2, {"helpfulness": 3})
    # Of helpfulness pair 1 ties, and pair 2 is reversed: the rejected response has the higher score.
    assert methods["SimPO"]["accuracy"]["no_object"]["value"] == 0.5
    assert methods["SimPO"]["accuracy"]["helpfulness"]["value"] == 1.0
    assert methods["other"]["accuracy"]["helpfulness"]["value"] == pytest.approx(1 / 3)
    assert methods["other"]["worst_dimension"] == "helpfulness"
    # Pair 0: (1 + 0) / 2, pair 1: 1, pair 2: (1 + 0) / 2, pair 3: 1.
    assert methods["other"]["accuracy"]["mean"]["value"] == 0.75
    assert methods["other"]["mean_accuracy_by_seed"] == [0.5, 1.0]
    assert methods["other"]["difference"]["helpfulness"]["value"] == 1.0
    assert methods["other"]["logp_chosen"]["helpfulness"]["value"] == pytest.approx(0.0)
    assert methods["other"]["asked"]["helpfulness"]["value"] == pytest.approx(0.25)
    against = found["against SimPO"]["other"]
    assert against["accuracy"]["helpfulness"]["value"] == pytest.approx(-2 / 3)
    assert against["difference"]["no_object"]["value"] == pytest.approx(1.0)
    assert found["against before training"]["SimPO"]["accuracy"]["no_object"]["value"] == 0.5


def test_a_reward_is_of_sums_against_the_model_before():
    # 4 tokens against 2: the mean log-probs prefer the chosen response, the sums do not, and have not moved that way.
    gaps = {str(record): [1.0] for record in range(4)}
    found = summary.summarise(rows_of({"SimPO": ({r: [0.1, -1.5] for r in gaps}, None)}, gaps))
    rewards = found["methods"]["SimPO"]["reward_accuracy"]
    assert rewards["no_object"]["value"] == 1.0 and rewards["helpfulness"]["value"] == 0.0


def test_folds_that_a_method_lacks_do_not_count():
    gaps = {str(record): [1.0] for record in range(4)}
    rows = rows_of({"SimPO": ({r: [1.0, 1.0] for r in gaps}, None)}, gaps)
    assert summary.summarise(rows[:-1])["pairs"] == 2
    assert summary.summarise(rows[:3])["status"].startswith("not run")


def test_the_question_alone_is_kept():
    asked = real_model.Message("user", "Answer.\n\nQuestion: Who?\n\nPassages:\nOne.")
    pair = real_model.Pair(0, (asked,), "a", "b", {})
    assert real_model.question_alone(pair).messages[0].content == "Who?"
    plain = real_model.Pair(0, (real_model.Message("user", "Question: Who?"),), "a", "b", {})
    assert real_model.question_alone(plain) is plain


@pytest.mark.slow
def test_it_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    demo_folder(tmp_path / "model")
    pairs = [json.loads(line) for line in HELDOUT_FILE.read_text().splitlines()[:24]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    out = tmp_path / "out.json"
    arguments = ["real_model.py", "--smoke", "--device", "cpu", "--model", str(tmp_path / "model"),
                 "--pairs", str(tmp_path / "pairs.json"), "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    for name in ("AMoPO gaussian", "AMoPO worst_first", "AMoPO score_gap", "AMoPO published"):
        monkeypatch.delitem(real_model.METHODS, name)
    real_model.main()
    first = json.loads(out.read_text())["rows"]
    assert first[-1]["case"] == "summary" and first[-1]["status"] == "ok" and first[-1]["pairs"] == 12
    tokens = {each["case"]: each["computed_tokens"] for each in first if "computed_tokens" in each}
    assert tokens["SimPO"] == pytest.approx(tokens["AMoPO uniform"], rel=0.35)  # of a step of two pairs
    assert out.with_suffix(".png").stat().st_size > 10_000
    asked = [each for each in first if each["case"] == "SimPO"][0]
    for record, low in asked["asked_low"].items():  # no_object's instruction names no score
        high = asked["judged"][record]["logps"]
        np.testing.assert_allclose(low["logps"][0], high[0], rtol=1e-3)
        assert not np.allclose(low["logps"][1], high[1], rtol=1e-5)

    # A row that is missing and a method that changed are run, the others stay as they are.
    kept = json.loads(out.read_text())
    kept["rows"] = [each for each in kept["rows"] if each.get("name") != "DPO 1"]
    kept["rows"][0]["methods"]["SimPO"]["beta"] = 3.0
    for each in kept["rows"]:
        each["seconds"] = -1.0
    out.write_text(json.dumps(kept))
    real_model.main()
    again = {each["name"]: each for each in json.loads(out.read_text())["rows"] if "name" in each}
    assert {name for name, each in again.items() if each["seconds"] != -1.0} == {"DPO 1", "SimPO 0", "SimPO 1"}
    assert again["DPO 1"]["judged"] == next(each for each in first if each.get("name") == "DPO 1")["judged"]
    kept["rows"][0]["tokens_digest"] = "another"
    out.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="name another --out"):
        real_model.main()

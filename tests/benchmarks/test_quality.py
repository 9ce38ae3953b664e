"""The judged task: what its program calls good, and that the comparison runs from end to end."""

import json
import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import quality  # noqa: E402
import quality_task as task  # noqa: E402

QUESTION = task.Question((4, 9, 1), "largest", "in brackets")


@pytest.mark.parametrize(
    ("response", "scores"),
    [
        ("[ 9 ]", (5, 5, 5)),
        ("[ 4 ]", (1, 5, 5)),
        ("answer : 9", (5, 1, 5)),
        ("9 and 9", (5, 1, 5)),
        ("9 and 4", (1, 1, 5)),
        ("well , [ 9 ]", (5, 5, 1)),
        ("[ 9 ] . i hope this helps", (5, 5, 1)),
        ("[ 9 ] - 9 -", (5, 1, 1)),
        ("", (1, 1, 1)),
        ("9", (5, 1, 1)),
        ("[ [ [", (1, 1, 1)),
    ],
)
def test_judging(response, scores):
    assert tuple(task.judge(QUESTION, response).values()) == scores


def test_made_responses_are_judged_as_they_were_made():
    rng = random.Random(0)
    for good in range(8):
        wanted = [good & 1, good >> 1 & 1, good >> 2 & 1]
        for _ in range(50):
            question = task.make_question(rng)
            found = task.judge(question, task.make_response(rng, question, *wanted))
            assert [value == 5 for value in found.values()] == [bool(each) for each in wanted]


def test_every_word_has_a_token_and_pairs_prefer_the_higher_sum():
    tokenizer = task.make_tokenizer()
    pairs = task.make_pairs(random.Random(1), 300)
    assert any(p.chosen_scores[k] < p.rejected_scores[k] for p in pairs for k in task.JUDGED)  # as in real data
    for pair in pairs:
        assert sum(pair.chosen_scores.values()) > sum(pair.rejected_scores.values())
        for text in (pair.messages[0].content, pair.chosen, pair.rejected):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_the_comparison_runs_and_counts_tokens_alike(tmp_path, monkeypatch, capsys):
    out = tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", "--smoke", "--device", "cpu", "--out", str(out)])
    quality.main()
    rows = json.loads(out.read_text())["rows"]
    summary = rows[-1]
    assert summary["status"] == "ok" and summary["seeds"] == 2
    assert set(summary["rates"]) == set(quality.METHODS) and out.with_suffix(".png").stat().st_size > 10_000
    tokens = {row["case"]: row["computed_tokens"] for row in rows if "computed_tokens" in row}
    assert tokens["SimPO"] == pytest.approx(tokens["AMoPO mean"], rel=0.15)
    assert "against SimPO: " in capsys.readouterr().out


def test_intervals_over_seeds():
    # 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) = 4.303.
    found = quality.over_seeds([1.0, 2.0, 3.0])
    assert found["value"] == 2 and found["high"] - 2 == pytest.approx(4.303 / 3**0.5, abs=1e-3)

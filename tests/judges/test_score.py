"""`amopo-fast score`: pairs of any format get scores, a kill costs nothing twice, and what cannot be done is named."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from judge_server import JudgeServer, word_score

from amopo_fast.cli import main
from amopo_fast.data.pairs import read_pairs
from amopo_fast.errors import JudgeError
from amopo_fast.judges import client
from amopo_fast.judges.scored_pairs import rescaled

RULES = """
def words(messages, answer, dimension):
    return min(5, len(answer.split()))

def letters(messages, answer, dimension):
    return None if "?" in answer else len(answer) * (3 if dimension == "a" else -1)

def same(messages, answer, dimension):
    return 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    (tmp_path / "rules_for_score.py").write_text(RULES)
    return tmp_path


def pairs(count, path="pairs.jsonl"):
    rng = np.random.default_rng(0)
    words = "one two three four five six".split()
    with open(path, "w") as file:
        for number in range(count):
            chosen, rejected = (" ".join(rng.choice(words, rng.integers(1, 9))) + f" {side}" for side in "cr")
            record = {"prompt": f"question {number}", "chosen": f"{chosen} {number}", "rejected": rejected}
            file.write(json.dumps(record) + "\n")
    return path


def score(*options, code=0):
    assert main(["score", *map(str, options)]) == code


def lines(path):
    return [json.loads(line) for line in open(path)]


def test_scored_pairs_are_what_training_reads(folder, capsys):
    score(pairs(9), "--judge", "rules_for_score:words", "--dimensions", "length", "--output_file", "out.jsonl")
    found, _ = read_pairs("out.jsonl", dimensions=["no_object", "length"])
    for pair, record in zip(found, lines("pairs.jsonl"), strict=True):
        assert (pair.messages[0].content, pair.chosen, pair.rejected) == tuple(record.values())
        assert pair.chosen_scores == {"length": min(5, len(pair.chosen.split()))}
        assert pair.rejected_scores == {"length": min(5, len(pair.rejected.split()))}
    out = capsys.readouterr().out
    assert "9 pairs: out.jsonl" in out and "amopo-fast validate out.jsonl --dimensions no_object length" in out
    assert sorted(path.name for path in folder.iterdir() if "out" in path.name) == ["out.jsonl"]


def test_whatever_a_pair_holds_is_carried_over(folder):
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": 1}}}
    tools = [{"type": "function", "function": {"name": "find"}}]
    records = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},
                           {"from": "human", "value": "Where?"}],
         "chosen": {"from": "gpt", "value": "Here.", "honesty": 4}, "rejected": {"from": "gpt", "value": "No."},
         "system": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}},
    ]  # fmt: skip
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = [{"role": "user", "content": "Find it"}]
    record = {"prompt": asked, "tools": tools, "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
              "rejected": [{"role": "assistant", "content": "No", "reasoning_content": "Hm"}]}  # fmt: skip
    (folder / "b.jsonl").write_text(json.dumps(record) + "\n")
    judge = ("--judge", "rules_for_score:words", "--dimensions", "length")
    for name in ("a", "b"):
        keep = ("--keep", "honesty") if name == "a" else ()
        score(f"{name}.jsonl", *judge, *keep, "--output_file", f"{name}.out.jsonl")
        before, _ = read_pairs(f"{name}.jsonl", dimensions=["no_object"])
        after, _ = read_pairs(f"{name}.out.jsonl", dimensions=["no_object", "length"])
        for field in ("messages", "chosen", "rejected", "chosen_fields", "rejected_fields", "tools",
                      "chat_template_kwargs"):  # fmt: skip
            assert getattr(before[0], field) == getattr(after[0], field), field
    assert lines("a.out.jsonl")[0]["chosen_scores"] == {"length": 1, "honesty": 4}


def test_a_judges_own_scale_is_mapped_and_missing_scores_are_left_out(folder, capsys):
    pairs(40)
    with open("pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "q", "chosen": "what?", "rejected": "no"}) + "\n")
    judge = ("pairs.jsonl", "--judge", "rules_for_score:letters", "--output_file", "out.jsonl")
    judge += ("--dimensions", "a", "b")
    score(*judge, code=1)
    assert "map its scale with --rescale 1" in capsys.readouterr().err
    score(*judge, "--rescale", "0.5", "--score_min", "1", "--score_max", "4")
    out = capsys.readouterr()
    assert "2 scores are missing: the program gave None" in out.err
    assert "--score_min 1 --score_max 4 --missing_scores absent" in out.out
    read, _ = read_pairs("out.jsonl", dimensions=["no_object", "a", "b"], score_range=(1, 4), missing_scores="absent")
    found = np.array([[side[name] for side in (pair.chosen_scores, pair.rejected_scores)] for pair in read[:40]
                      for name in ("a", "b")]).reshape(40, 2, 2)  # fmt: skip
    assert read[40].chosen_scores == {} and set(read[40].rejected_scores) == {"a", "b"}
    assert set(np.unique(found)) <= set(np.arange(1, 4.1, 0.5)) and found.min() == 1 and found.max() == 4
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in read[:40]])
    more = np.sign(lengths[:, 0] - lengths[:, 1])
    assert (np.sign(found[:, 0, 0] - found[:, 0, 1]) * more >= 0).all()
    assert (np.sign(found[:, 1, 0] - found[:, 1, 1]) * more <= 0).all()
    score("pairs.jsonl", "--judge", "rules_for_score:same", "--dimensions", "a", "--output_file", "s.jsonl",
          "--rescale", "1", code=1)  # fmt: skip
    assert "scores of a are all 7" in capsys.readouterr().err


def test_rescaling_is_linear_between_the_tails():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 2, 1)) * 3 + 10
    first, last = np.percentile(table, [1, 99])
    expected = np.clip((table - first) / (last - first), 0, 1) * 5
    assert np.abs(rescaled(table, ["x"], (0, 5), 0.001) - expected).max() < 0.00051
    with pytest.raises(JudgeError):
        rescaled(np.full((4, 2, 1), 2.0), ["x"], (0, 5), 1)


def test_where_the_preference_is_all_that_is_known(folder, capsys):
    score(pairs(3), "--scores", "preference", "--dimensions", "quality", "--output_file", "out.jsonl")
    assert [(r["chosen_scores"], r["rejected_scores"]) for r in lines("out.jsonl")] == [({"quality": 5}, {"quality": 0})] * 3  # noqa: E501
    assert "is all that these scores know" in capsys.readouterr().out
    score("pairs.jsonl", "--scores", "preference", "--dimensions", "a", "b", "--output_file", "o.jsonl", code=2)
    assert "one dimension" in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_and_pays_nothing_twice(folder, monkeypatch):
    monkeypatch.setattr("amopo_fast.judges.scored_pairs.CHUNK", 4)
    pairs(40)
    options = ("--dimensions", "x", "y", "--judge_concurrency", "3", "--output_file", "out.jsonl")

    def slow(body, number):
        time.sleep(0.01)
        return word_score(body)

    with JudgeServer(slow) as server:
        code = "import sys\nfrom amopo_fast.judges import scored_pairs\nscored_pairs.CHUNK = 4\n" \
               "from amopo_fast.cli import main\nsys.exit(main(sys.argv[1:]))"  # fmt: skip
        words = [sys.executable, "-c", code, "score", "pairs.jsonl", "--judge", server.url, *options]
        path = os.pathsep.join(sys.path)
        run = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 30
        while len(server.bodies) < 60 and time.monotonic() < until and run.poll() is None:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        said = run.communicate()[1]
        assert 60 <= len(server.bodies) < 160 and not os.path.exists("out.jsonl"), said
        with open("out.jsonl.partial", "a") as file:
            file.write('{"pair": "torn')
        paid = len(lines("out.jsonl.replies"))
        asked = len(server.bodies)
        assert asked - paid <= 3  # those that were under way
        score("pairs.jsonl", "--judge", server.url, *options)
        assert len(server.bodies) - asked == 160 - paid
        score("pairs.jsonl", "--judge", server.url, *options[:-1], "whole.jsonl")
    assert open("out.jsonl").read() == open("whole.jsonl").read() and len(lines("out.jsonl")) == 40
    assert not os.path.exists("out.jsonl.partial")


def test_a_changed_option_or_other_data_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("amopo_fast.judges.scored_pairs.CHUNK", 2)
    pairs(8)

    def fails(body, number):
        return word_score(body) if number <= 10 else (401, {}, b"expired")

    options = ["pairs.jsonl", "--output_file", "out.jsonl", "--judge_concurrency", "1"]
    with JudgeServer(fails, models=("judge", "other")) as server:
        judge = ["--judge", server.url, "--judge_model"]
        score(*options, *judge, "judge", "--dimensions", "x", code=1)
        assert "set the environment variable JUDGE_API_KEY" in capsys.readouterr().err
        assert len(lines("out.jsonl.partial")) == 5
        for changed in (["judge", "--dimensions", "x", "y"], ["other", "--dimensions", "x"],
                        ["judge", "--dimensions", "x", "--score_max", "9"]):  # fmt: skip
            score(*options, *judge, *changed, code=2)
            assert "was begun with another" in capsys.readouterr().err
        content = open("pairs.jsonl").read()
        open("pairs.jsonl", "w").write(content.replace("question 1", "question 0", 1))
        score(*options, *judge, "judge", "--dimensions", "x", code=2)
        assert "is not the data that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "localhost:8000", "--dimensions", "x"], "write an address"),
        (["--judge", "rules_for_score:words", "--dimensions", "no_object"], "no_object has no scores"),
        (["--judge", "rules_for_score:words", "--dimensions", "x", "--judge_model", "m"], "judge_model has no effect"),
        (["--judge", "rules_for_score:words", "--dimensions", "x", "--output_file", "x.json"], "name a .jsonl file"),
        (["--judge", "rules_for_score:words", "--dimensions", "x", "--output_file", "pairs.jsonl"], "the data itself"),
        (["--judge", "rules_for_score:words", "--dimensions", "x", "--rescale", "0"], "rescale=0"),
        (["--judge", "rules_for_score:words", "--dimensions", "x", "--judge_request", "[1]"], "JSON object"),
        (["--dimensions", "x"], "one of the arguments --judge --scores is required"),
    ],
)
def test_bad_usage_is_named(folder, capsys, options, message):
    pairs(2)
    try:
        code = main(["score", "pairs.jsonl", "--output_file", "out.jsonl", *options])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err and not os.path.exists("out.jsonl")


def test_a_bad_record_is_known_before_anything_is_paid(folder, capsys):
    pairs(5)
    with open("pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "q", "chosen": "same", "rejected": "same"}) + "\n")
    options = ("--dimensions", "x", "--output_file", "out.jsonl")
    with JudgeServer(word_score) as server:
        score("pairs.jsonl", "--judge", server.url, *options, code=1)
        assert "record 5" in capsys.readouterr().err and not server.bodies
        score("pairs.jsonl", "--judge", server.url, *options, "--on_bad_record", "skip")
    assert "1 bad records" in capsys.readouterr().out and len(lines("out.jsonl")) == 5


def test_validate_prints_the_command(folder, capsys):
    pairs(3)
    assert main(["validate", "pairs.jsonl", "--dimensions", "no_object", "honesty"]) == 1
    out = capsys.readouterr().out
    commands = [line.split()[1:] for line in out.splitlines() if line.startswith("  amopo-fast score")]
    with JudgeServer(word_score) as server:
        for words in commands:
            assert main([server.url if word.startswith("http") else word for word in words]) == 0
            scored = words[words.index("--output_file") + 1]
            assert main(["validate", scored, "--dimensions", "no_object", "honesty"]) == 0
    assert len(commands) == 2

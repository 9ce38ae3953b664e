"""Answers at asked levels: the same after a kill, scored by what was asked, summed up with intervals, drawn."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from demo_folder import demo_folder
from judge_server import JudgeServer, word_score

from amopo_fast.cli import main
from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.evaluation import steer as module
from amopo_fast.evaluation.steer import Plan
from amopo_fast.evaluation.steer_summary import steer_summary
from amopo_fast.judges import client
from amopo_fast.report.steering import steering_page, steering_rows

RULES = """
def count(messages, answer, dimension):
    assert messages[-1]["content"].startswith("Look at")  # the prompt as it stands in the file, without instruction
    return len(answer) % 6 if dimension == "helpfulness" else None

def longer(messages, first, second, dimension):
    return float(len(first) > len(second)) if len(first) != len(second) else 0.5
"""
SHORT = ["--max_new_tokens", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steer")
    demo_folder(folder / "base")
    lines = [line for line in HELDOUT_FILE.read_text().splitlines() if '"prompt": "Look at' in line][:14]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    train = ["train", "--model_name_or_path", str(folder / "base"), "--train_data", str(folder / "pairs.jsonl"),
             "--use_cpu", "true", "--pairs_per_step", "2", "--max_steps", "3", "--learning_rate", "1e-2",
             "--save_strategy", "no", "--output_dir", str(folder / "run")]  # fmt: skip
    assert main(train) == 0
    (folder / "rules_for_steer.py").write_text(RULES)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def steer(*options, code=0):
    assert main(["steer", *map(str, options)]) == code


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]


def test_models_side_by_side(runs, tmp_path, capsys):
    options = ["base", "run", "--prompts", "pairs.jsonl", "--levels", "1,5", *SHORT, "--dimension", "helpfulness",
               "correctness", "--judge", "rules_for_steer:count", "--output_dir", tmp_path]  # fmt: skip
    steer(*options)
    printed = capsys.readouterr()
    assert "the program gave None" in printed.err and "base has no recipe of its own" not in printed.out
    found = json.loads((tmp_path / "steer.json").read_text())
    answers, scores = lines(tmp_path / "answers.jsonl"), lines(tmp_path / "scores.jsonl")
    assert len(answers) == len(scores) == 2 * 14 * 2 * 2
    of = {(a["model"], a["prompt"], a["dimension"], a["level"]): a["answer"] for a in answers}
    assert len(of) == len(answers)
    for model in ("base", "run"):
        by_level = [[len(of[model, p, "helpfulness", level]) % 6 for p in range(14)] for level in (1.0, 5.0)]
        part = found["models"][model]["helpfulness"]
        assert [x["value"] for x in part["judged"]["helpfulness"]["by_level"]] == pytest.approx(np.mean(by_level, 1))
        change = part["judged"]["helpfulness"]["change"]
        assert change["value"] == pytest.approx(np.mean(by_level[1]) - np.mean(by_level[0]))
        assert change["low"] <= change["value"] <= change["high"] and change["low"] < change["high"]
        assert part["judged"]["correctness"]["change"]["value"] is None
        words = [np.mean([len(of[model, p, "helpfulness", level].split()) for p in range(14)]) for level in (1.0, 5.0)]
        assert [x["value"] for x in part["words"]] == pytest.approx(words)
    assert any(of["run", p, "helpfulness", 1.0] != of["run", p, "helpfulness", 5.0] for p in range(14))
    assert any(of["run", p, "helpfulness", 1.0] != of["base", p, "helpfulness", 1.0] for p in range(14))
    page = (tmp_path / "steer.html").read_text()
    assert "Asked level and received score" in page and "changed a column" in page and "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")  # noqa: E501
    assert (tmp_path / "steer.png").stat().st_size > 20_000
    before = (tmp_path / "answers.jsonl").read_bytes(), (tmp_path / "steer.json").read_bytes()
    steer(*options)  # all is there: nothing is loaded
    assert before == ((tmp_path / "answers.jsonl").read_bytes(), (tmp_path / "steer.json").read_bytes())


def test_killed_it_goes_on_as_if_it_had_not_been(runs, tmp_path):
    """By SIGKILL while answers are drawn at random, then by a server that fails while they are scored."""
    options = ["base", "run", "--prompts", "pairs.jsonl", "--max_prompts", "6", "--levels", "1,3,5", "--dimension",
               "helpfulness", "--max_new_tokens", "5", "--batch_size", "4", "--temperature", "1",
               "--judge_retries", "0", "--judge_dimensions", "helpfulness", "length"]  # fmt: skip
    failing = []

    def judge(body, number):
        return (401, {}, b"expired") if failing and number > 30 else word_score(body)

    with JudgeServer(judge) as server:
        options += ["--judge", server.url]
        killed = os.fork()  # a process of its own would import torch again
        if not killed:
            own = module.generate
            module.generate = lambda *args, **kwargs: (time.sleep(0.3), own(*args, **kwargs))[1]
            try:
                main(["steer", *options, "--output_dir", str(tmp_path / "a")])
            finally:
                os._exit(0)
        answers = tmp_path / "a" / "answers.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (answers.exists() and answers.read_bytes().count(b"\n") > 9):
            time.sleep(0.002)
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert 8 <= len(lines(answers)) < 36
        whole = answers.read_text().splitlines(keepends=True)[:7]  # a kill in the middle of a write
        answers.write_text("".join(whole) + '{"model": "run", "ans')
        failing.append(True)
        steer(*options, "--output_dir", tmp_path / "a", code=1)
        asked = len(server.bodies)
        paid = len((tmp_path / "a" / "replies.jsonl").read_text().splitlines())
        assert paid == 30
        failing.clear()
        steer(*options, "--output_dir", tmp_path / "a")
        steer(*options, "--output_dir", tmp_path / "b")
    whole = (tmp_path / "b" / "replies.jsonl").read_text().splitlines()
    assert len((tmp_path / "a" / "replies.jsonl").read_text().splitlines()) == len(whole)
    assert len(server.bodies) - asked == 2 * len(whole) - paid
    for name in ("answers.jsonl", "scores.jsonl", "steer.json", "steer.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_changed_option_is_refused(runs, tmp_path, capsys):
    options = ["run", "--prompts", "pairs.jsonl", "--max_prompts", "3", "--dimension", "helpfulness", "--output_dir",
               tmp_path]  # fmt: skip
    steer(*options, *SHORT, "--levels", "1,5")
    for changed, name in (
        ([*SHORT, "--levels", "1,3,5"], "levels"),
        (["--max_new_tokens", "4", "--levels", "1,5"], "max_new_tokens"),
        ([*SHORT, "--levels", "1,5", "--max_prompts", "2"], "prompts"),
        ([*SHORT, "--levels", "1,5", "--seed", "1"], "seed"),
    ):
        steer(*options, *changed, code=2)
        assert f"was begun with another {name}" in capsys.readouterr().err
    judged = [*options, *SHORT, "--levels", "1,5", "--judge"]
    steer(*judged, "rules_for_steer:count")
    steer(*judged, "rules_for_steer:longer", code=2)
    assert "scores.jsonl was begun with another judge" in capsys.readouterr().err


def test_wins_by_scores_and_by_verdicts_in_both_positions(runs, tmp_path):
    options = ["base", "run", "--prompts", "pairs.jsonl", "--levels", "1,5", *SHORT, "--dimension", "helpfulness",
               "--output_dir", tmp_path]  # fmt: skip
    steer(*options, "--judge", "rules_for_steer:count")
    answers = lines(tmp_path / "answers.jsonl")
    base, run = answers[:28], answers[28:]
    found = json.loads((tmp_path / "steer.json").read_text())
    scores = [len(b["answer"]) % 6 - len(a["answer"]) % 6 for a, b in zip(base, run, strict=True)]
    expected = [np.mean(0.5 + 0.5 * np.sign(scores[level::2])) for level in range(2)]
    assert found["win_rates_by"] == "scores"
    assert [x["value"] for x in found["win_rates"]["run"]["helpfulness"]] == pytest.approx(expected)
    steer(*options, "--pairwise_judge", "rules_for_steer:longer")
    found = json.loads((tmp_path / "steer.json").read_text())
    longer = [len(b["answer"]) - len(a["answer"]) for a, b in zip(base, run, strict=True)]
    expected = [np.mean(0.5 + 0.5 * np.sign(longer[level::2])) for level in range(2)]
    assert found["win_rates_by"] == "verdicts" and found["judged"] == []
    assert [x["value"] for x in found["win_rates"]["run"]["helpfulness"]] == pytest.approx(expected)
    with JudgeServer(lambda body, number: "Better: A") as server:  # always the first position
        (tmp_path / "wins.jsonl").unlink()
        steer(*options, "--pairwise_judge", server.url)
    found = json.loads((tmp_path / "steer.json").read_text())
    assert [x["value"] for x in found["win_rates"]["run"]["helpfulness"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base"], "none of base has an amopo_recipe.json"),
        (["run", "--dimension", "speed"], "not trained to be asked for speed: choose from helpfulness"),
        (["run", "--dimension", "no_object"], "not trained to be asked for no_object"),
        (["run", "--levels", "1,9"], "level 9 is not in the model's range: choose from 0 to 5"),
        (["run", "--levels", "5,1"], "write each once, from low to high"),
        (["run", "--levels", "1,x"], "finite number"),
        (["run", "--judge_model", "m"], "judge_model has no effect without a judge"),
        (["run", "--pairwise_judge", "rules_for_steer:longer"], "compares models: name two or more"),
        (["run", "--judge", "rules_for_steer:missing"], "no function 'missing'"),
    ],
)
def test_bad_usage_is_named_before_anything_is_answered(runs, tmp_path, capsys, options, message):
    try:
        code = main(["steer", *options, "--prompts", "pairs.jsonl", "--output_dir", str(tmp_path)])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2) and message in capsys.readouterr().err and not (tmp_path / "answers.jsonl").exists()


# numbers and pictures


def example(models=("base", "trained"), prompts=40, seed=0):
    """Scores that follow the asked level in the trained model, by 0.5 a level; asking for a costs b."""
    rng = np.random.default_rng(seed)
    plan = Plan([[{"role": "user", "content": str(p)}] for p in range(prompts)], ("a", "b"), (1.0, 3.0, 5.0))
    shape = (len(models), *plan.shape)
    received = rng.normal(size=(*shape, 2)) * 0.3 + rng.normal(size=(1, prompts, 1, 1, 1)) + 3
    levels = np.array(plan.levels)
    received[1, :, 0, :, 0] += 0.5 * levels
    received[1, :, 0, :, 1] -= 0.25 * levels
    received[0, :3, 0, 0, 0] = np.nan
    words = rng.integers(5, 50, shape).astype(float)
    return plan, list(models), words, received


def test_the_summary_finds_what_is_there():
    plan, models, words, received = example()
    found = steer_summary(plan, models, (0, 5), words, judged=("a", "b"), received=received)
    changed = {name: part["judged"] for name, part in found["models"]["trained"].items()}
    for asked, judged, true in (("a", "a", 2.0), ("a", "b", -1.0), ("b", "a", 0.0), ("b", "b", 0.0)):
        change = changed[asked][judged]["change"]
        column = received[1, :, "ab".index(asked), :, "ab".index(judged)]
        assert change["value"] == pytest.approx((column[:, 2] - column[:, 0]).mean())
        assert change["low"] - 0.05 < true < change["high"] + 0.05 and change["high"] - change["low"] < 0.4
    # Prompt by prompt: the prompts' own spread, 1, is not in it.
    assert found["difference"]["trained"]["a"]["a"]["low"] > 1.7
    assert changed["a"]["a"]["rank_correlation"]["low"] > 0.4 > changed["b"]["b"]["rank_correlation"]["high"]
    base = found["models"]["base"]["a"]["judged"]["a"]
    assert base["by_level"][0]["value"] == pytest.approx(np.nanmean(received[0, :, 0, 0, 0]))
    wins = 0.5 + 0.5 * np.sign(received[1, 3:, 0, 0, 0] - received[0, 3:, 0, 0, 0])
    assert found["win_rates"]["trained"]["a"][0]["value"] == pytest.approx(wins.mean())
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("case", ["whole", "one model", "few prompts", "nothing judged", "one level", "no score"])
def test_the_pictures_take_what_there_is(case):
    plan, models, words, received = example(prompts=5 if case == "few prompts" else 40)
    judged: tuple[str, ...] = ("a", "b")
    if case == "one model":
        models, words, received = models[1:], words[1:], received[1:]
    if case == "nothing judged":
        judged, received = (), None
    if case == "one level":
        plan = Plan(plan.prompts, plan.dimensions, plan.levels[:1])
        words, received = words[..., :1], received[..., :1, :]
    if case == "no score":
        received[..., 0] = np.nan
    found = json.loads(json.dumps(steer_summary(plan, models, (0, 5), words, judged=judged, received=received)))
    titles = [row.title for row in steering_rows(found)]
    assert titles[-1] == "Length of the answers"
    assert ("Asked level and received score" in titles) == (case != "nothing judged")
    assert ("Wins over base" in titles) == (case not in ("one model", "nothing judged"))
    page = steering_page(found, "someone")
    assert page.count("<svg") == sum(len(row.panels) for row in steering_rows(found)) and "nan" not in page.lower()

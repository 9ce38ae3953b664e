"""The three kinds of judges behind one interface, what they read from replies, and verdicts in both positions."""

import json
import math

import numpy as np
import pytest
import torch
from demo_folder import demo_folder
from judge_server import JudgeServer, word_score
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.demo.judge import score as demo_score
from amopo_fast.demo.model import demo_config
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.errors import DataError, JudgeError, OptionError
from amopo_fast.judges.choose import JudgeOptions, check_read, kind_of, load_comparer, load_judge
from amopo_fast.judges.judge import Answer, both_positions
from amopo_fast.judges.program import Program
from amopo_fast.judges.reward_model import RewardModel
from amopo_fast.judges.template import JudgeTemplate, read_score, read_verdict
from amopo_fast.prompts.wording import Wording

WORDING = Wording.load()
QUESTION = ({"role": "user", "content": "Where is the lamp?"},)


def answers(*texts):
    return [Answer(QUESTION, text) for text in texts]


# what a reply says


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 4", 4), ("4", 4), (" 4.5\n", 4.5), ("**Score:** 3", 3), ("Score: **2**", 2), ("4/5", 4),
        ("3 out of 5.", 3), ("The response is fine.\nScore: 4", 4), ("<think>Score: 1? No.</think>\nScore: 5", 5),
        ("Rating: 2", 2), ("A score of 3", 3), ("Score: 1 at first sight.\nScore: 4", 4), ("SCORE = 0", 0), ("`5`", 5),
        ("Score: 7", math.nan), ("Score: -1", math.nan), ("-1", math.nan), ("", math.nan), ("good", math.nan),
        ("1 or 2", math.nan), ("I count 3 errors", math.nan), ("Score: high", math.nan),
    ],
)  # fmt: skip
def test_the_score_of_a_reply(reply, score):
    assert read_score(reply, (0, 5)) == pytest.approx(score, nan_ok=True)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Better: A", 1), ("b", 0), ("**Better:** tie", 0.5), ("Better: response B", 0), ("Response A.", 1),
        ("A is longer.\nBetter: B", 0), ("neither", math.nan), ("A and B", math.nan), ("", math.nan),
        ("Better: both", math.nan),
    ],
)  # fmt: skip
def test_the_verdict_of_a_reply(reply, verdict):
    assert read_verdict(reply) == pytest.approx(verdict, nan_ok=True)


def test_a_template_fills_its_placeholders_and_nothing_else():
    template = JudgeTemplate.load("score")
    text = template.to_score(Answer(QUESTION, "{dimension} {0} \\1"), "instruction_following", WORDING, (0, 10))
    assert "{dimension} {0} \\1" in text and "instruction following alone: whether the response does all" in text
    assert "from 0 to 10" in text and "[user]\nWhere is the lamp?" in text


@pytest.mark.parametrize(
    ("text", "message"), [("{answer} {level}", "{level}"), ("{dimension}", "no {answer}"), (None, "check the path")]
)
def test_a_bad_template_is_named(tmp_path, text, message):
    path = tmp_path / "template.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        JudgeTemplate.load("score", path)


# programs


def length(messages, answer, dimension):
    assert messages == list(QUESTION)
    return {"words": len(answer.split()), "letters": len(answer), "none": None}[dimension]


def test_a_program_scores():
    judge = Program("here:length", length)
    counted = []
    found = judge.scores(answers("a b", "ccc"), ["words", "letters", "none"], counted.append)
    assert np.array_equal(found, [[2, 3, math.nan], [1, 3, math.nan]], equal_nan=True)
    assert sum(counted) == 6 and judge.usage.unknown == {"the program gave None": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [("good", "gave str 'good'"), (math.inf, "finite"), ([1], "gave list"), (KeyError("x"), "KeyError: 'x'")],
)
def test_a_program_that_gives_no_number_is_named(value, message):
    def bad(messages, answer, dimension):
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(JudgeError, match=message):
        Program("here:bad", bad).scores(answers("a"), ["words"])


def test_a_program_is_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_rules_of_this_test.py").write_text("def f(messages, answer, dimension):\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    judge = load_judge("own_rules_of_this_test:f", JudgeOptions(), wording=WORDING, score_range=(0, 5))
    assert judge.scores(answers("a"), ["x"])[0, 0] == 3
    for spec, message in (("own_rules_of_this_test:g", "no function 'g'"), ("no_such_module_here:f", "No module")):
        with pytest.raises(OptionError, match=message):
            load_judge(spec, JudgeOptions(), wording=WORDING, score_range=(0, 5))


def test_the_demos_judge_gives_the_scores_of_the_demos_data():
    records = [json.loads(line) for line in HELDOUT_FILE.read_text().splitlines()[:80]]
    for record in records:
        messages = [{"role": "user", "content": record["prompt"]}]
        for side in (record["chosen"], record["rejected"]):
            for name in ("helpfulness", "correctness", "instruction_following"):
                assert demo_score(messages, side["response"], name) == side[name]
        assert demo_score(messages, "lamp lamp lamp", "helpfulness") == 0
    assert demo_score(list(QUESTION), "In the hall.", "helpfulness") is None


# servers


def test_a_server_is_asked_once_for_each_answer_and_dimension():
    with JudgeServer(word_score) as server:
        judge = load_judge(server.url, JudgeOptions(concurrency=3), wording=WORDING, score_range=(0, 5))
        found = judge.scores(answers("a", "a b", "a b c"), ["helpfulness", "correctness"])
    expected = []
    for text in ("a", "a b", "a b c"):
        for name in ("helpfulness", "correctness"):
            prompt = JudgeTemplate.load("score").to_score(Answer(QUESTION, text), name, WORDING, (0, 5))
            expected.append(len(prompt.split()) % 6)
    assert np.array_equal(found.ravel(), expected) and len(set(expected)) > 2
    assert judge.identity["model"] == "judge" and judge.usage.requests == 6


def test_replies_without_a_score_are_counted_with_an_example():
    def garbage(body, number):
        return "As a language model I like both." if "bad" in body["messages"][0]["content"] else "Score: 3"

    with JudgeServer(garbage) as server:
        judge = load_judge(server.url, JudgeOptions(), wording=WORDING, score_range=(0, 5))
        found = judge.scores(answers("fine", "bad", "bad too"), ["x"])
    assert np.array_equal(found[:, 0], [3, math.nan, math.nan], equal_nan=True)
    [note] = judge.usage.notes()
    assert note.startswith("2 scores are missing: the reply holds no score") and "As a language model" in note


# comparing


def test_a_judge_that_prefers_a_position_says_nothing():
    with JudgeServer(lambda body, number: "Better: A") as server:
        comparer = load_comparer(server.url, JudgeOptions(), wording=WORDING, score_range=(0, 5))
        assert np.array_equal(both_positions(comparer, answers("a", "b"), answers("c", "d"), ["x"]), [[0.5], [0.5]])
        assert len(server.bodies) == 4


def test_both_positions_agree_contradict_or_tie():
    def longer(messages, first, second, dimension):
        if first.startswith("tie") and second.startswith("tie"):
            return 0.5 if first < second else 1
        return float(len(first) > len(second))

    found = both_positions(Program("here:longer", longer), answers("aa", "a", "tie 1", "aa"),
                           answers("a", "aa", "tie 2", "bb"), ["x"])  # fmt: skip
    assert found[:, 0].tolist() == [1, 0, 0.25, 0.5]
    with pytest.raises(JudgeError, match="gave 2 for two answers"):
        Program("here:bad", lambda *_: 2).preferences(answers("a"), answers("b"), ["x"])


# reward models


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A random model with two outputs, and one with a single one."""
    folder = tmp_path_factory.mktemp("reward")
    for name, labels in (("two", {0: "helpfulness", 1: "brevity"}), ("one", {0: "LABEL_0"})):
        torch.manual_seed(0)
        config = Qwen2Config(**{**demo_config().to_dict(), "id2label": labels, "max_position_embeddings": 64})
        Qwen2ForSequenceClassification(config).save_pretrained(folder / name)
        demo_tokenizer().save_pretrained(folder / name)
    return folder


def test_a_reward_model_scores_the_conversation_with_its_answer(reward):
    judge = RewardModel.load(str(reward / "two"), batch_size=2)
    texts = ["short", "a longer answer of many words", "word " * 80, "other"]
    found = judge.scores(answers(*texts), ["brevity", "helpfulness"])
    model = Qwen2ForSequenceClassification.from_pretrained(reward / "two").double()
    for row, text in enumerate(texts):
        ids = judge.tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": text}], tokenize=True,
                                                  return_dict=False)  # fmt: skip
        if len(ids) > 64:
            assert np.isnan(found[row]).all()
            continue
        expected = model(torch.tensor([ids])).logits[0].detach().numpy()[::-1]
        assert np.abs(found[row] - expected).max() < 1e-5 * np.abs(expected).max()
    assert judge.usage.unknown == {f"longer than the 64 tokens that {reward / 'two'} can read": 2}
    assert not np.isnan(found[[0, 1, 3]]).any()
    wins = load_comparer(str(reward / "two"), JudgeOptions(), wording=WORDING, score_range=(0, 5))
    assert wins.preferences(answers("short"), answers("other"), ["brevity"]) == (found[0, 0] > found[3, 0])


def test_outputs_of_a_reward_model_are_named(reward, tmp_path):
    judge = RewardModel.load(str(reward / "two"), outputs={"length": 1})
    assert judge.columns(["length", "helpfulness"]) == [1, 0]
    assert RewardModel.load(str(reward / "one")).columns(["anything"]) == [0]
    with pytest.raises(OptionError, match="2 outputs .helpfulness, brevity. and none for speed.*judge_outputs speed="):
        judge.columns(["speed"])
    with pytest.raises(OptionError, match="1 output .LABEL_0. and none for a"):
        RewardModel.load(str(reward / "one")).columns(["a", "b"])
    with pytest.raises(OptionError, match="x=2: .* has the outputs 0 to 1"):
        RewardModel.load(str(reward / "two"), outputs={"x": 2})
    demo_folder(tmp_path / "causal")
    with pytest.raises(OptionError, match="lacks 1 tensors .score.weight., which would be random"):
        RewardModel.load(str(tmp_path / "causal"))


# choosing


def test_the_kind_of_a_judge():
    assert kind_of("http://localhost:8000/v1") == "server" and kind_of("a.b:c") == "program"
    assert kind_of("runs/reward") == "reward model" and kind_of("org/name") == "reward model"
    with pytest.raises(OptionError, match="write an address as http://"):
        kind_of("localhost:8000")


def test_an_option_that_no_judge_reads_is_refused():
    with pytest.raises(OptionError, match="judge_model has no effect with a:b, a program"):
        check_read(["a:b"], JudgeOptions(model="x"))
    with pytest.raises(OptionError, match="judge_batch_size has no effect without a judge"):
        check_read([], JudgeOptions(batch_size=3))
    check_read(["a:b", "http://x/v1"], JudgeOptions(model="x"))
    with pytest.raises(OptionError, match="judge_timeout|timeout"):
        JudgeOptions(timeout=0)

"""Mixing, holding out and streaming: load_data."""

import datetime
import json
from collections import Counter

import numpy as np
import pytest
import tokenizers_for_tests as chat
from chat_templates import FAMILIES

from amopo_fast.data.config import DataConfig
from amopo_fast.errors import DataError, OptionError
from amopo_fast.prompts.dataset import load_data, load_eval_data
from amopo_fast.prompts.store import TokenStore

DIMENSIONS = ["no_object", "helpfulness"]


@pytest.fixture(scope="module")
def tokenizer():
    return chat.make_tokenizer()


def pairs_file(folder, name, count, prompts=None, **changes):
    records = [
        {
            "prompt": f"{name} {i % (prompts or count)}?",
            "chosen": {"response": f"Answer {i}.", "helpfulness": 4},
            "rejected": {"response": "No.", "helpfulness": None if changes.get("absent") and i % 2 else 2},
        }
        for i in range(count)
    ]
    if changes.get("absent"):
        for record in records[1::3]:
            record["chosen"]["helpfulness"] = None
    if changes.get("bad"):
        records[1]["prompt"] = ""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return str(path)


def text(tokenizer, pair):
    return tokenizer.decode(pair.prompts[0]) + tokenizer.decode(pair.chosen)


def test_weights_take_whole_sets_and_shares_and_no_record_number_twice(tmp_path, tokenizer):
    a, b = pairs_file(tmp_path, "A", 10), pairs_file(tmp_path, "B", 8)
    config = DataConfig(train_data=[f"{a},weight=2.5", f"{b},weight=0.5"], dimensions=DIMENSIONS)
    data = load_data(config, tokenizer, seed=3)
    texts = Counter(text(tokenizer, pair) for pair in data.train)
    from_a = [count for key, count in texts.items() if "A " in key]
    assert sorted(from_a) == [2] * 5 + [3] * 5
    assert sum(count for key, count in texts.items() if "B " in key) == 4
    records = [pair.record for pair in data.train]
    assert len(set(records)) == len(records) == 29 and records[:10] == list(range(10))
    again = load_data(config, tokenizer, seed=3)
    assert [pair.record for pair in again.train] == records
    assert [pair.record for pair in load_data(config, tokenizer, seed=4).train] != records


def test_a_weight_that_takes_no_pair_is_named(tmp_path, tokenizer):
    config = DataConfig(train_data=[f"{pairs_file(tmp_path, 'A', 10)},weight=0.01"], dimensions=DIMENSIONS)
    with pytest.raises(OptionError, match="weights of train_data leave no pair to train on; raise weight"):
        load_data(config, tokenizer, seed=0)


def test_held_out_prompts_are_in_no_training_pair(tmp_path, tokenizer):
    path = pairs_file(tmp_path, "A", 200, prompts=50)
    data = load_data(DataConfig(train_data=[path], dimensions=DIMENSIONS, eval_share=0.3), tokenizer, seed=1)
    prompts = [{tokenizer.decode(pair.prompts[0]) for pair in side} for side in (data.train, data.eval_dataset)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 50 and 5 < len(prompts[1]) < 28
    assert len(data.train) + len(data.eval_dataset) == 200
    counts = data.counts[path]
    assert (counts.pairs, counts.held_out) == (len(data.train), len(data.eval_dataset))


def test_evaluation_sets_by_name_and_prompts_that_training_has_too(tmp_path, tokenizer):
    a, b = pairs_file(tmp_path, "A", 6), pairs_file(tmp_path, "B", 4)
    config = DataConfig(train_data=[a], eval_data={"own": a, "other": b}, dimensions=DIMENSIONS)
    data = load_data(config, tokenizer, seed=0)
    assert {name: len(pairs) for name, pairs in data.evals.items()} == {"own": 6, "other": 4}
    assert data.shared_prompts == 6
    one = load_data(DataConfig(train_data=[a], eval_data=[b], dimensions=DIMENSIONS), tokenizer, seed=0)
    assert len(one.eval_dataset) == 4 and one.shared_prompts == 0
    with pytest.raises(ValueError, match="two evaluation sets are named 'A'"):
        load_data(DataConfig(train_data=[a], eval_data=[a, a], dimensions=DIMENSIONS), tokenizer, seed=0)


def same(a, b):
    return a.record == b.record and a.truncated == b.truncated and all(
        (x is None and y is None) or np.array_equal(x, y)
        for x, y in zip((*a.prompts, a.chosen, a.rejected), (*b.prompts, b.chosen, b.rejected), strict=True)
    )


def test_streamed_tokens_are_those_in_memory(tmp_path, tokenizer):
    path = pairs_file(tmp_path, "A", 150, absent=True)
    options = {"train_data": [path], "dimensions": DIMENSIONS, "missing_scores": "absent"}
    memory = load_data(DataConfig(**options), tokenizer, seed=0)
    streamed = load_data(DataConfig(**options, streaming=True), tokenizer, seed=0, folder=tmp_path / "tokens")
    assert isinstance(streamed.train, TokenStore) and len(streamed.train) == len(memory.train) == 150
    assert all(same(a, b) for a, b in zip(memory.train, streamed.train, strict=True))
    assert any(pair.prompts[1] is None for pair in streamed.train)
    assert streamed.train[-1].record == 149 and len(streamed.train[3:5]) == 2


def test_token_files_that_are_not_whole_are_refused(tmp_path, tokenizer):
    path = pairs_file(tmp_path, "A", 5)
    config = DataConfig(train_data=[path], dimensions=DIMENSIONS, streaming=True)
    folder = load_data(config, tokenizer, seed=0, folder=tmp_path / "tokens").train.folder
    tokens = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(tokens[:-4])
    with pytest.raises(ValueError, match="not whole"):
        TokenStore(folder)
    (folder / "about.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenized pairs"):
        TokenStore(folder)


def test_bad_records_stop_or_are_counted(tmp_path, tokenizer):
    path = pairs_file(tmp_path, "A", 5, bad=True)
    with pytest.raises(DataError, match="record 1"):
        load_data(DataConfig(train_data=[path], dimensions=DIMENSIONS), tokenizer, seed=0)
    config = DataConfig(train_data=[path], dimensions=DIMENSIONS, on_bad_record="skip")
    data = load_data(config, tokenizer, seed=0)
    assert data.counts[path].skipped == {"empty text": 1} and "record 1" in data.counts[path].examples[0]
    assert [pair.record for pair in data.train] == [0, 2, 3, 4]


def test_score_ranges_come_from_the_data_or_have_to_be_set(tmp_path, tokenizer):
    own = pairs_file(tmp_path, "A", 4)
    rows = [
        {"prompt": "p", "response": text, "helpfulness": score, "correctness": 1}
        for text, score in (("a", 4), ("b", 2))
    ]
    steer = tmp_path / "steer.jsonl"
    steer.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = load_data(DataConfig(train_data=[str(steer)], dimensions=DIMENSIONS), tokenizer, seed=0)
    assert alone.score_range == (0, 4) and "4 out of 4" in tokenizer.decode(alone.train[0].prompts[1])
    with pytest.raises(ValueError, match="different ranges.*score_min"):
        load_data(DataConfig(train_data=[own, str(steer)], dimensions=DIMENSIONS), tokenizer, seed=0)
    config = DataConfig(train_data=[own, str(steer)], dimensions=DIMENSIONS, score_min=0, score_max=10)
    mixed = load_data(config, tokenizer, seed=0).train
    assert "4 out of 10" in tokenizer.decode(mixed[0].prompts[1])
    assert "10 out of 10" in tokenizer.decode(mixed[4].prompts[1]) and mixed[4].record == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data": None}, "train_data is missing"),
        ({"eval_share": 1.5}, "eval_share"),
        ({"eval_share": 0.5, "eval_data": ["x.json"]}, "leave it out"),
        ({"eval_share": 1e-9}, "holds out no prompt"),
        ({"score_max": 3}, "both score_min and score_max"),
        ({"streaming": True}, "folder"),
    ],
)
def test_options_that_cannot_be(tmp_path, tokenizer, options, message):
    base = {"train_data": [pairs_file(tmp_path, "A", 3)], "dimensions": DIMENSIONS}
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(**{**base, **options}), tokenizer, seed=0)


def test_one_of_several_sets_may_lack_a_dimension_but_not_all(tmp_path, tokenizer):
    own = pairs_file(tmp_path, "A", 4)
    other = tmp_path / "other.jsonl"
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "honesty_chosen": 3, "honesty_rejected": 1}
    other.write_text(json.dumps(row) + "\n")
    options = {"train_data": [own, str(other)], "missing_scores": "absent"}
    data = load_data(DataConfig(**options, dimensions=["no_object", "helpfulness", "honesty"]), tokenizer, seed=0)
    present = [[prompt is not None for prompt in pair.prompts] for pair in data.train]
    assert present == [[True, True, False]] * 4 + [[True, False, True]]
    with pytest.raises(DataError, match=r"A.json, .*other.jsonl, field .honest.: unknown dimension: .*helpf"):
        load_data(DataConfig(**options, dimensions=["no_object", "honest"]), tokenizer, seed=0)
    # What only the evaluation data has cannot be trained on.
    options = {"train_data": [own], "eval_data": [str(other)], "missing_scores": "absent"}
    with pytest.raises(DataError, match="'honesty': unknown dimension"):
        load_data(DataConfig(**options, dimensions=["no_object", "helpfulness", "honesty"]), tokenizer, seed=0)
    data = load_data(DataConfig(**options, dimensions=["no_object", "helpfulness"]), tokenizer, seed=0)
    assert data.eval_dataset[0].prompts[1] is None


def test_the_options_of_the_template_reach_the_prompts(tmp_path):
    smollm3 = chat.family_tokenizer(FAMILIES["smollm-3"])
    path = pairs_file(tmp_path, "A", 2)
    options = {"train_data": [path], "dimensions": DIMENSIONS}
    config = DataConfig(**options, template_date="2024-12-24", chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}
    data = load_data(config, smollm3, seed=0)
    text = smollm3.decode(data.train[0].prompts[0])
    assert data.recipe.prompt_options["template_date"] == "2024-12-24"
    assert "24 December 2024" in text and "/no_think" in text
    again = load_data(DataConfig(**options, eval_data=[path]), smollm3, seed=0)
    assert again.recipe.prompt_options["template_date"] == datetime.date.today().isoformat()
    evaluation = load_eval_data(DataConfig(eval_data=[path], dimensions=DIMENSIONS), smollm3, seed=0)
    assert evaluation.recipe.prompt_options == again.recipe.prompt_options
    without_clock = load_data(DataConfig(**options), chat.make_tokenizer(), seed=0)
    assert without_clock.recipe.prompt_options["template_date"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_date": "yesterday"}, "template_date='yesterday' is no date"),
        ({"chat_template_kwargs": "{'a': 1}"}, "chat_template_kwargs: not valid JSON"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs: write a mapping"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: 'tools' is not a variable"),
        ({"chat_template_kwargs": {"a b": 1}}, "'a b' is not a variable"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "what JSON can hold"),
    ],
)
def test_options_of_the_template_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_responses_that_do_not_fit_are_dropped_on_request_and_counted(tmp_path, tokenizer):
    path = tmp_path / "A.jsonl"
    rows = [
        {"prompt": f"{i}?", "chosen": f"Answer {i} " * (200 if i % 2 else 1), "rejected": "No.",
         "helpfulness_chosen": 4, "helpfulness_rejected": 2} for i in range(6)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_data": [str(path)], "dimensions": DIMENSIONS, "max_length": 300}
    data = load_data(DataConfig(**options, truncated_responses="drop"), tokenizer, seed=0)
    assert [pair.record for pair in data.train] == [0, 2, 4]
    assert data.counts[str(path)].dropped == {"a response that does not fit max_length=300": 3}
    ends = {
        choice: [pair.chosen[-1] for pair in load_data(
            DataConfig(**options, truncated_responses=choice), tokenizer, seed=0).train]
        for choice in ("no_end", "keep_end")
    }  # fmt: skip
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [token == end for token in ends["no_end"]] == [True, False] * 3
    assert [token == end for token in ends["keep_end"]] == [True] * 6

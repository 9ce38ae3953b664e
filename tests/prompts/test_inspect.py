"""The report of a file and the picture of a record."""

import json

import numpy as np
import pytest
import tokenizers_for_tests as chat
from rich.console import Console

from amopo_fast.data.config import DataConfig
from amopo_fast.data.pairs import Message, Pair
from amopo_fast.errors import DataError, OptionError
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.inspect import validate_data, validate_file
from amopo_fast.prompts.show import show_record

DIMENSIONS = ("no_object", "helpfulness", "correctness")


def record(prompt="When?", chosen="In 1840.", rejected="No.", helpfulness=(4, 2), correctness=(5, 5)):
    sides = {
        side: {"response": text, "helpfulness": helpfulness[index], "correctness": correctness[index]}
        for index, (side, text) in enumerate((("chosen", chosen), ("rejected", rejected)))
    }
    return {"prompt": prompt, **sides}


def printed(renderable, width=200):
    console = Console(width=width, color_system=None, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


@pytest.fixture
def path(tmp_path):
    records = [
        record(),
        record(prompt="Who was\tit?", helpfulness=(3, 5)),
        record(),
        record(chosen="No.", rejected="In 1840.", helpfulness=(2.5, 2.5)),
        record(prompt="Where? " * 150, correctness=(None, 1)),
        record(prompt=""),
        record(prompt="</s>"),
        record(helpfulness=(9, 1)),
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    return path


def test_report_without_a_tokenizer(path):
    report = validate_file(path, dimensions=DIMENSIONS, missing_scores="absent")
    assert (report.records, report.pairs, report.ok) == (8, 6, False)
    assert report.bad_by_kind == {"empty text": 1, "score out of range": 1}
    assert ["record 5" in report.errors[0], "record 7" in report.errors[1]] == [True, True]
    helpfulness, correctness = report.dimensions["helpfulness"], report.dimensions["correctness"]
    assert helpfulness.chosen == {2.5: 1, 3.0: 1, 4.0: 4} and helpfulness.rejected == {2.0: 4, 2.5: 1, 5.0: 1}
    assert (helpfulness.chosen_higher, helpfulness.ties, helpfulness.reversals, helpfulness.absent) == (4, 1, 1, 0)
    assert (correctness.chosen_higher, correctness.ties, correctness.reversals, correctness.absent) == (0, 5, 0, 1)
    assert (report.repeated_prompts, report.repeated_pairs, report.contradictions) == (2, 1, 1)
    assert report.unit == "words" and report.truncated is None
    prompt = report.lengths["prompt"]
    assert (prompt.min, prompt.max, prompt.percentiles[50]) == (1, 150, 1.0)
    assert sum(prompt.counts) == 6 and len(prompt.edges) == len(prompt.counts) + 1
    assert report.lengths["sequence"].max == 152


def test_report_with_a_tokenizer(path):
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=400)
    report = validate_file(path, dimensions=DIMENSIONS, missing_scores="absent", builder=builder)
    assert report.bad_by_kind == {"empty text": 1, "score out of range": 1}
    assert [f"record {index}" in text for index, text in zip((5, 7), report.errors, strict=True)] == [True] * 2
    assert (report.pairs, report.unit, report.max_length, report.truncated) == (6, "tokens", 400, 1)
    assert report.notes == {"text of a special token, encoded as text": 1}
    assert "1 pairs: text of a special token" in printed(report)
    assert report.lengths["sequence"].max > 400  # before any shortening
    long = Pair(0, (Message("user", "Where? " * 150),), "In 1840.", "No.", {"helpfulness": 4.0})
    tokens = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=10_000).tokens(long)
    assert report.lengths["prompt"].max == max(len(ids) for ids in tokens.prompts if ids is not None)
    assert report.lengths["chosen"].max == len(tokens.chosen)


def test_a_pair_that_cannot_be_shortened_enough_is_bad(path):
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS, max_length=30)
    report = validate_file(path, dimensions=DIMENSIONS, missing_scores="absent", builder=builder)
    assert report.pairs == 0 and report.bad_by_kind["prompt does not fit"] == 6
    assert "0 usable pairs" in printed(report)


def test_a_file_that_cannot_be_read_is_a_report_too(tmp_path):
    (tmp_path / "cut.json").write_text('[{"prompt": ')
    report = validate_file(tmp_path / "cut.json", dimensions=DIMENSIONS)
    assert not report.ok and report.bad_by_kind == {"truncated file": 1}
    assert "Remedy" in printed(report)
    assert validate_file(tmp_path / "none.json", dimensions=DIMENSIONS).bad_by_kind == {"unreadable file": 1}


def test_the_report_is_readable_and_is_json(path):
    report = validate_file(path, dimensions=DIMENSIONS, missing_scores="absent")
    content = json.loads(report.to_json())
    assert content["ok"] is False and content["dimensions"]["helpfulness"]["reversals"] == 1
    assert content["lengths"]["prompt"]["percentiles"]["50"] == 1.0
    text = printed(report)
    for part in ("8 records, 6 usable pairs", "chosen higher", "score out of range", "record 5", "█"):
        assert part in text
    path.write_text(json.dumps([record(prompt=f"{index}?") for index in range(3)]))
    assert "no bad records" in printed(validate_file(path, dimensions=DIMENSIONS))


def test_many_errors_are_counted_but_not_all_printed(path):
    path.write_text(json.dumps([record(), *(record(prompt="") for _ in range(50))]))
    report = validate_file(path, dimensions=DIMENSIONS)
    assert report.bad_by_kind == {"empty text": 50} and len(report.errors) == 20
    assert "and 30 more" in printed(report)


def test_a_record_is_shown_with_every_token_and_its_labels_in_brackets():
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS)
    messages = (Message("user", "When\x1b[31m? [red]"),)
    pair = Pair(3, messages, "In é 1840.", "No.", {"helpfulness": 4.0}, {}, "file.json")
    tokens = builder.tokens(pair)
    text = printed(show_record(pair, builder, prompt_tokens=None), width=100_000)
    assert "\x1b" not in text and "\\x1b" in text and "[red]" in text.replace("|", "")
    chosen = "".join(
        f"[{builder.tokenizer.decode([i])}]" if "\ufffd" not in builder.tokenizer.decode([i])
        else f"[{builder.tokenizer.convert_ids_to_tokens(int(i))}]"
        for i in tokens.chosen
    )  # fmt: skip
    assert text.count(chosen) == 2 and chosen.endswith("[<|im_end|>]")
    assert "correctness: absent" in text
    assert f"helpfulness, chosen, score 4: {len(tokens.prompts[1])} prompt + {len(tokens.chosen)} label" in text
    assert "record 3 of file.json: 4 sequences" in text
    labels = len(tokens.chosen) + len(tokens.rejected)
    prompts = len(tokens.prompts[0]) + len(tokens.prompts[1])
    assert f"{2 * prompts + 2 * labels} tokens" in text and f"{prompts + 2 * labels} tokens to compute" in text
    assert text.count("|") - text.count("<|im_") - text.count("|>") == 2 * prompts


def test_long_prompts_lose_their_middle_in_the_picture_only():
    builder = PromptBuilder(chat.make_tokenizer(), DIMENSIONS)
    rng = np.random.default_rng(0)
    messages = (Message("user", " ".join(map(str, rng.integers(10, 99, 40)))),)
    pair = Pair(0, messages, "In 1840.", "No.", {"helpfulness": 4.0})
    prompt = builder.tokens(pair).prompts[1]
    text = printed(show_record(pair, builder, prompt_tokens=30), width=100_000)
    assert f"… {len(prompt) - 30} tokens …" in text and "assistant" in text.replace("|", "")
    with pytest.raises(DataError, match="record 0"):
        show_record(Pair(0, pair.messages, "No.", "No.", pair.chosen_scores), builder)


def test_data_of_a_run_is_reported_with_shared_prompts_and_fits_a_terminal(path, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([record(), record(prompt="New?")]))
    config = DataConfig(
        train_data=[str(path), str(other)],
        eval_data={"held": str(other)},
        dimensions=list(DIMENSIONS),
        missing_scores="absent",
    )
    report = validate_data(config)
    assert (report.ok, report.shared_prompts, len(report.training)) == (False, 2, 2)
    assert json.loads(report.to_json())["evaluation"][0]["pairs"] == 2
    text = printed(report, width=80)
    assert "2 prompts are in both" in text and max(map(len, text.splitlines())) <= 80
    for part in ("helpfulness", "correctness", "reversals"):
        assert part in text
    with pytest.raises(OptionError, match="both score_min and score_max"):
        DataConfig(train_data=[str(other)], eval_data=[str(path)], dimensions=list(DIMENSIONS), score_max=3)

"""Every format on a small file in its source's own schema, and every kind of file."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amopo_fast.data.pairs import Message, Reading, read_pairs, read_records
from amopo_fast.data.sources.formats import open_source
from amopo_fast.data.sources.spec import Source, parse_sources
from amopo_fast.errors import DataError, OptionError


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def helpsteer2_row(prompt, response, helpfulness, correctness=3, **more):
    return {
        "prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": correctness,
        "coherence": 4, "complexity": 1, "verbosity": 2, **more,
    }  # fmt: skip


HELPSTEER2 = [
    helpsteer2_row("Name a river.", "The Elbe.", 2, correctness=4),
    helpsteer2_row("Name a river.", "The Elbe, 1094 km long.", 4, correctness=1),
    helpsteer2_row("Name a hill.", "A.", 3),
    helpsteer2_row("Name a hill.", "B.", 3),
    helpsteer2_row("Alone?", "Yes.", 3),
    helpsteer2_row(
        "Hello.\n<extra_id_1>Assistant\nHello, what is it?\n<extra_id_1>User\nName a lake.", "Müritz.", 4
    ),
    helpsteer2_row("Hello.\n<extra_id_1>Assistant\nHello, what is it?\n<extra_id_1>User\nName a lake.", "No.", 0),
]


def test_helpsteer2_pairs_neighbours_by_helpfulness(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", HELPSTEER2)
    dimensions = ("no_object", "helpfulness", "correctness", "verbosity")
    pairs, errors, dropped = read_records(path, Reading(dimensions, (0, 4)))
    assert errors == [] and dropped == {"a tie in helpfulness": 1, "a prompt with one response": 1}
    river, lake = pairs
    assert (river.record, river.chosen, river.rejected) == (0, "The Elbe, 1094 km long.", "The Elbe.")
    assert river.chosen_scores == {"helpfulness": 4, "correctness": 1, "verbosity": 2}
    assert river.rejected_scores == {"helpfulness": 2, "correctness": 4, "verbosity": 2}
    assert lake.messages == (
        Message("user", "Hello."),
        Message("assistant", "Hello, what is it?"),
        Message("user", "Name a lake."),
    )
    by_correctness = Source.parse(f"{path},rank_by=correctness+verbosity")
    assert read_records(by_correctness, Reading(dimensions, (0, 4))).pairs[0].chosen == "The Elbe."


def test_tied_dimensions_are_dropped_on_request(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", HELPSTEER2)
    reading = Reading(("no_object", "helpfulness", "correctness", "verbosity"), (0, 4), tied_dimensions="drop")
    assert [sorted(pair.chosen_scores) for pair in read_records(path, reading).pairs] == [
        ["helpfulness"], ["helpfulness"],
    ]  # fmt: skip
    reading = Reading(("coherence",), (0, 4), tied_dimensions="drop")
    assert read_records(path, reading).dropped["no dimension that prefers the chosen response"] == 2


def preference_row(prompt, one, two, strength, split="train"):
    return {
        "split": split, "prompt": prompt, "response_1": one, "response_2": two, "preference_strength": strength,
        "preference_statement": "Response 2 is better than Response 1.", "preference_elaboration": "It says more.",
        "three_most_similar_preferences": [], "all_preferences_unprocessed": [],
    }  # fmt: skip


PREFERENCES = [
    preference_row("Name a river.", "The Elbe.", "The Elbe, 1094 km long.", -2),
    preference_row("Name a hill.", "A.", "B.", 0),
    preference_row("Name a hill.", "A.", "B.", 3, "validation"),
]


def test_helpsteer2_preference_takes_its_scores_from_helpsteer2(tmp_path):
    scores = write_lines(tmp_path / "train.jsonl", HELPSTEER2)
    path = tmp_path / "preference.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in PREFERENCES))
    dimensions = ("no_object", "helpfulness", "correctness")
    source = Source.parse({"path": str(path), "scores": [str(scores)]})
    pairs, errors, dropped = read_records(source, Reading(dimensions, (0, 4)))
    assert errors == [] and dropped == {"a tie in preference_strength": 1}
    assert (pairs[0].chosen, pairs[1].chosen) == ("The Elbe.", "B.")  # as preferred, against the helpfulness
    assert pairs[0].chosen_scores == {"helpfulness": 2, "correctness": 4}
    only = Source.parse(f"{path},scores={scores},split=validation")
    assert [pair.record for pair in read_records(only, Reading(dimensions, (0, 4))).pairs] == [2]
    with pytest.raises(DataError, match="no scores.*scores"):
        read_records(path, Reading(dimensions, (0, 4)))
    assert len(read_records(path, Reading(("no_object",))).pairs) == 2


def completion(response, overall, **ratings):
    annotations = {
        aspect: {"Rating": ratings.get(aspect, "3"), "Rationale": "because"}
        for aspect in ("helpfulness", "honesty", "instruction_following", "truthfulness")
    }
    annotations["helpfulness"]["Type"] = ["1"]
    return {
        "annotations": annotations, "custom_system_prompt": "Be kind.", "model": "some-7b", "principle": "honesty",
        "response": response, "critique": "fine", "overall_score": overall, "fine-grained_score": overall / 2,
    }  # fmt: skip


ULTRAFEEDBACK = [
    {
        "source": "sharegpt",
        "instruction": "Name a river.",
        "models": ["a", "b", "c", "d"],
        "completions": [
            completion("Elbe", 6.0, helpfulness="4"),
            completion("Oder", 8.5, helpfulness="2", honesty="N/A"),
            completion("none", 2.0, truthfulness="1"),
            completion("Main", 6.0),
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
    {"source": "flan", "instruction": "2+2?", "completions": [completion("4", 7.0), completion("four", 7.0)]},
]


def test_ultrafeedback_pairs_by_overall_score(tmp_path):
    path = write_lines(tmp_path / "ultra.jsonl", ULTRAFEEDBACK)
    dimensions = ("no_object", "helpfulness", "honesty", "instruction_following", "truthfulness")
    reading = Reading(dimensions, (1, 5), missing_scores="absent")
    pairs, errors, dropped = read_records(path, reading)
    assert errors == [] and dropped == {"a tie in overall_score": 1}
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("Oder", "none")]
    assert pairs[0].chosen_scores == {"helpfulness": 2, "instruction_following": 3, "truthfulness": 3}  # N/A is absent
    assert pairs[0].rejected_scores["truthfulness"] == 1
    every = read_records(Source.parse(f"{path},pairs=all"), reading).pairs
    assert [(pair.chosen, pair.rejected, pair.part) for pair in every] == [
        ("Oder", "Elbe", 0), ("Elbe", "none", 1), ("Oder", "none", 2), ("Oder", "Main", 3), ("Main", "none", 4),
    ]  # fmt: skip
    # By the mean of the aspects, "Elbe" is best.
    assert read_records(Source.parse(f"{path},rank_by=mean"), reading).pairs[0].chosen == "Elbe"
    with pytest.raises(DataError, match=r"completions\[1\].annotations.honesty.Rating"):
        read_pairs(path, dimensions=dimensions, score_range=(1, 5))


USER = {"role": "user", "content": "Name a river."}
ELBE = {"role": "assistant", "content": "The Elbe."}
NONE = {"role": "assistant", "content": "No."}
TURNS = [{"role": "system", "content": "Be brief."}, USER, NONE, {"role": "user", "content": "Please."}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "No."}, [USER]),
        ({"prompt": TURNS, "chosen": "The Elbe.", "rejected": "No."}, TURNS),
        ({"prompt": TURNS, "chosen": [ELBE], "rejected": [NONE]}, TURNS),
        ({"prompt": "Name a river.", "chosen": [USER, ELBE], "rejected": [USER, NONE]}, [USER]),
        ({"chosen": [*TURNS, ELBE], "rejected": [*TURNS, NONE]}, TURNS),
        ({"prompt": TURNS[:2], "chosen": [*TURNS[2:], ELBE], "rejected": [*TURNS[2:], NONE]}, TURNS),
    ],
    ids=["strings", "turns", "completions", "repeated prompt", "implicit prompt", "turns after the prompt"],
)
@pytest.mark.parametrize(
    "scores",
    [
        {"helpfulness_chosen": 4, "helpfulness_rejected": 1},
        {"chosen_helpfulness": 4, "rejected_helpfulness": 1},
        {"chosen_scores": {"helpfulness": 4}, "rejected_scores": {"helpfulness": 1}},
    ],
    ids=["suffix", "prefix", "mapping"],
)
def test_trl(tmp_path, record, messages, scores):
    path = write_lines(tmp_path / "pairs.jsonl", [{**record, **scores}])
    [pair], _ = read_pairs(path, dimensions=("no_object", "helpfulness"))
    assert [message.as_dict() for message in pair.messages] == messages
    assert (pair.chosen, pair.rejected) == ("The Elbe.", "No.")
    assert (pair.chosen_scores, pair.rejected_scores) == ({"helpfulness": 4}, {"helpfulness": 1})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "field 'prompt': missing field"),
        ({"chosen": [ELBE], "rejected": [NONE]}, "field 'prompt': missing field"),
        ({"prompt": "a", "chosen": [ELBE], "rejected": "b"}, "field 'rejected': wrong type"),
        ({"prompt": "a", "chosen": [USER], "rejected": [NONE]}, "field 'chosen': wrong order"),
        ({"prompt": "a", "chosen": [], "rejected": [NONE]}, "field 'chosen': wrong order"),
        ({"prompt": "a", "chosen": [NONE, USER, ELBE], "rejected": [USER, NONE]}, "different conversations"),
        ({"prompt": "a", "chosen": ["x"], "rejected": [NONE]}, "field 'chosen': wrong order"),
    ],
)
def test_bad_trl_records_name_the_column(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", [record]), dimensions=("no_object",))


def test_a_missing_score_column_is_named_as_it_is_spelt(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "helpfulness_chosen": 4}]
    with pytest.raises(DataError, match="'helpfulness_rejected'"):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", rows), dimensions=("helpfulness",))


ROWS = [
    {"prompt": f'Question {i}, "quoted"\nand on?', "chosen": f"{i}", "rejected": "No.", "a_chosen": 4, "a_rejected": 1}
    for i in range(600)
]


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def csv_file(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.csv.gz"])
def test_every_kind_of_file_holds_the_same_pairs(tmp_path, name):
    path = tmp_path / name
    if name.startswith("pairs.csv"):
        csv_file(tmp_path / "pairs.csv", ROWS)
        if name.endswith("gz"):
            path.write_bytes(gzip.compress((tmp_path / "pairs.csv").read_bytes()))
    elif name == "pairs.parquet":
        parquet(path, ROWS)
    elif name == "pairs.json":
        path.write_text(json.dumps(ROWS))
    else:
        write_lines(path, ROWS)
    pairs, _ = read_pairs(path, dimensions=("no_object", "a"))
    found = [(p.record, p.messages[0].content, p.chosen, p.chosen_scores, p.rejected_scores) for p in pairs]
    assert found == [(i, row["prompt"], row["chosen"], {"a": 4.0}, {"a": 1.0}) for i, row in enumerate(ROWS)]


def test_a_folder_of_parquet_files_is_read_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    parquet(folder / "train-0.parquet", ROWS[:3])
    parquet(folder / "test-0.parquet", ROWS[3:5])
    assert len(read_pairs(folder, dimensions=("a",))[0]) == 3
    pairs, _ = read_pairs(Source.parse(f"{folder},split=test"), dimensions=("a",))
    assert [pair.record for pair in pairs] == [0, 1] and pairs[0].source == f"{folder}:test"
    assert len(read_pairs(Source.parse(f"{folder},split=train[:2]"), dimensions=("a",))[0]) == 2
    with pytest.raises(DataError, match="unreadable data set.*Remedy"):
        read_pairs(Source.parse(f"{folder},split=nowhere"), dimensions=("a",))
    with pytest.raises(DataError, match="unreadable data set.*Remedy"):
        read_pairs("someone/no-such-data-set", dimensions=("a",))


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:4])}).save_to_disk(tmp_path / "saved")
    assert len(read_pairs(tmp_path / "saved", dimensions=("a",))[0]) == 4


def test_scores_are_mapped_to_the_range_that_prompts_name(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", HELPSTEER2)
    pairs = read_records(path, Reading(("helpfulness",), (0, 10))).pairs
    assert [pair.chosen_scores["helpfulness"] for pair in pairs] == [10.0, 10.0]
    assert pairs[0].rejected_scores == {"helpfulness": 5.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "3 is no data set"),
        ({"file": "a.json"}, "unknown option 'file'"),
        ("a.json,wieght=2", "unknown option 'wieght'; did you mean 'weight'"),
        ("a.json,weight=much", "a.json: weight must be a number"),
        ("a.json,weight=0", "weight=0 must be positive"),
        ("a.json,pairs=some", "choose best_worst or all"),
        ("a.json,score_min=1", "both score_min and score_max"),
        ({"path": ""}, "path must be"),
        ({"path": "a", "split": 3}, "split must be text"),
    ],
)
def test_bad_sources(value, message):
    with pytest.raises(ValueError, match=message):
        parse_sources([value])


@pytest.mark.parametrize(
    "option", ["split=test", "subset=all", "data_dir=x", "rank_by=helpfulness", "pairs=all", "scores=other.jsonl"]
)
def test_an_option_that_a_source_does_not_read_is_refused(tmp_path, option):
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(OptionError, match=f"pairs.jsonl: {option} has no effect on a file.*: leave it out"):
        open_source(Source.parse(f"{path},{option}"))
    path = write_lines(tmp_path / "preferences.jsonl", PREFERENCES)
    open_source(Source.parse(f"{path},split=train,scores={path}"))


def test_sources_of_a_mapping_are_named():
    sources = parse_sources({"own": "a.json", "other": {"path": "b", "weight": 2}})
    found = [(source.name, source.path, source.weight) for source in sources]
    assert found == [("own", "a.json", 1), ("other", "b", 2)]


def test_an_unknown_format_says_what_it_saw(tmp_path):
    path = write_lines(tmp_path / "alpaca.jsonl", [{"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="Alpaca.s preferences.*rename instruction, with its input"):
        open_source(Source.parse(path))
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="unknown format: records with the keys answer, question"):
        open_source(Source.parse(path))
    with pytest.raises(ValueError, match="unknown format 'helpsteer'; did you mean 'helpsteer2'"):
        open_source(Source.parse(f"{path},format=helpsteer"))

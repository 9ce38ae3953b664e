"""The command line end to end, in process, on files of a few records."""

import json
import re

import pytest
from demo_folder import demo_folder

from amopo_fast.cli import main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    demo_folder(folder / "model")
    records = [
        {
            "prompt": f"Name number {i} of the list, please.",
            "chosen": {"response": f"It is item {i}.", "helpfulness": 5, "correctness": 4, "instruction_following": 5},
            "rejected": {"response": "No idea.", "helpfulness": 1, "correctness": 4, "instruction_following": 2},
        }
        for i in range(6)
    ]
    (folder / "pairs.json").write_text(json.dumps(records))
    records[2]["chosen"]["correctness"] = 9
    (folder / "bad.json").write_text(json.dumps(records))
    return folder


def test_train_writes_model_metrics_and_plot_and_resumes(workspace, capsys):
    out = workspace / "run"
    config = workspace / "run.yaml"
    config.write_text(
        f"model_name_or_path: {workspace / 'model'}\ntrain_data: {workspace / 'pairs.json'}\n"
        f"eval_data: {workspace / 'pairs.json'}\noutput_dir: {out}\npairs_per_step: 3\nnum_train_epochs: 2\n"
        "learning_rate: 1.0e-3\nuse_cpu: true\neval_strategy: epoch\nsave_strategy: epoch\n"
    )
    assert main(["train", "--config", str(config), "--beta", "1.5"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"margin/correctness", "accuracy/mean", "weight/no_object", "tokens_per_second/computed"} <= lines[0].keys()
    assert any("eval_accuracy/helpfulness" in line for line in lines)
    assert (out / "model.safetensors").exists() and (out / "metrics.png").stat().st_size > 10_000
    longer = ["--beta", "1.5", "--num_train_epochs", "3", "--resume_from_checkpoint", "last"]
    assert main(["train", "--config", str(config), *longer]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_validate_tells_good_from_bad(workspace, capsys):
    assert main(["validate", str(workspace / "pairs.json")]) == 0
    assert main(["validate", str(workspace / "bad.json")]) == 1
    assert "record 2" in capsys.readouterr().out.replace("\n", " ")
    assert main(["validate", str(workspace / "pairs.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"][0]["pairs"] == 6


def test_show_prints_a_record_and_refuses_what_is_not_there(workspace, capsys):
    assert main(["show", str(workspace / "pairs.json"), "--record", "4"]) == 0
    shown = capsys.readouterr().out
    assert "8 sequences" in " ".join(shown.split())  # where a line breaks depends on the file's path
    assert "correctness, rejected, score 4" in shown
    labels = "".join(re.findall(r"\[([^\]]*)\]", shown.replace("\n", "")))
    assert "It is item 4." in labels and "No idea." in labels
    assert main(["show", str(workspace / "pairs.json"), "--record", "99"]) == 1
    assert "6 records" in capsys.readouterr().err
    assert main(["show", str(workspace / "bad.json"), "--record", "2"]) == 1
    assert "correctness" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message, code",
    [
        (["--train_data", "nowhere.json"], "nowhere.json", 1),
        ([], "train_data is missing", 2),
        (["--beta", "-1"], "beta=-1", 2),
        (["--weighting", "best"], "weighting='best'", 2),
        (["--on_bad_record", "ignore"], "on_bad_record", 2),
        (["--resume_from_checkpoint", "last"], "no checkpoint", 1),
    ],
)
def test_bad_options_end_with_a_sentence(workspace, tmp_path, capsys, options, message, code):
    base = ["--model_name_or_path", str(workspace / "model"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    if options and options[0] != "--train_data":
        base += ["--train_data", str(workspace / "pairs.json")]
    assert main(["train", *base, *options]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_key_of_the_configuration_is_named(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rat: 1\n")
    assert main(["train", "--config", str(config)]) == 2
    assert "unknown key 'learning_rat'" in capsys.readouterr().err

"""`amopo-fast estimate`: what it prints at any width, the very run of a configuration, an epoch's hours and cost."""

import json

import pytest
import yaml
from transformers import Qwen2Config

from amopo_fast.cli import main
from amopo_fast.demo.data import DIMENSIONS, TRAIN_FILE
from amopo_fast.demo.tokenizer import demo_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of 1.2 billion parameters, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    Qwen2Config(vocab_size=1152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=20, num_attention_heads=16,
                num_key_value_heads=4, tie_word_embeddings=False).save_pretrained(folder)  # fmt: skip
    demo_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def some_pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(TRAIN_FILE.read_text().splitlines()[:200]))
    return path


def report_of(capsys, *arguments):
    assert main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_report_adds_up(model, capsys):
    report = report_of(capsys, model / "config.json", "--gpu", "h200", "--gpus", "8")
    rows = {(row["optimizer"], row["gpus"]): row for row in report["rows"]}
    for row in rows.values():
        assert sum(row["parts"].values()) == row["peak"] and row["needed"] == row["peak"] + report["reserve"]
        assert row["fits"] and row["tokens_per_second"] > 0 and "reference" not in row and "hours" not in row
        host = "host" in row["optimizer"] or "weights too" in row["optimizer"]
        assert bool(row["copies"]) == bool(row["host_pinned"]) == host
    assert rows["4-bit, weights too", 1]["copies"]["hide"] and ("AdamW, fp32 weights", 8) in rows
    assert report["efficiency_source"].startswith("assumed") and report["advice"] is None and report["epoch"] is None
    assert rows["AdamW, fp32 weights", 1]["parts"]["weights"] == 4 * rows["AdamW, fp32 weights", 1]["parameters"]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_table_is_as_wide_as_the_terminal(model, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    command = ["estimate", str(model), "--gpu", "4090", "--pairs", "2000", "--pair_tokens", "3000", "--price", "2.5"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    table, _, rest = shown.partition("needed: ")
    lines = table[table.index("GiB on each GPU") :].splitlines()
    assert max(map(len, lines)) <= width and "…" not in shown
    words = table.split()
    for column in ("weights", "states", "grads", "acts", "work", "needed", "fits", "host", "tokens/s", "hours", "cost"):
        assert column in words
    assert "6,000,000 computed tokens" in shown and "that share is assumed, as 14B reached it on an H100" in rest
    # A line that is to be copied is never broken.
    assert any(line.endswith("--optimizer_states host --weights host --gradient_checkpointing true")
               for line in rest.splitlines())  # fmt: skip
    assert "hides behind" in rest or "do not hide behind" in rest


def test_an_epoch_takes_hours_and_money(model, capsys):
    report = report_of(capsys, model, "--gpu", "h100", "--pairs", 2000, "--pair_tokens", 3000, "--price", 2.5,
                       "--gpus", 4)  # fmt: skip
    for row in report["rows"]:
        hours = 2000 * 3000 / row["tokens_per_second"] / 3600
        assert row["hours"] == pytest.approx(hours) and row["cost"] == pytest.approx(hours * 2.5 * row["gpus"])


def test_host_memory_is_counted_where_it_is_known(model, capsys):
    unknown = report_of(capsys, model, "--gpu", "8")["rows"]
    little = report_of(capsys, model, "--gpu", "8", "--host_memory", "5")["rows"]
    lost = {a["optimizer"] for a, b in zip(unknown, little, strict=True) if a["fits"] and not b["fits"]}
    assert {"8-bit, weights too", "4-bit, weights too"} <= lost
    assert all(b["fits"] for a, b in zip(unknown, little, strict=True) if a["fits"] and not a["host_pinned"])


def test_the_very_run_of_a_configuration(model, some_pairs, capsys, tmp_path):
    run = {"model_name_or_path": str(model), "train_data": str(some_pairs), "dimensions": list(DIMENSIONS),
           "weight_precision": "bf16_stochastic", "optim_in_backward": "adamw_8bit", "optimizer_states": "host",
           "gradient_checkpointing": True, "pairs_per_step": 4, "tokens_per_micro_batch": 8192,
           "output_dir": str(tmp_path / "out")}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    report = report_of(capsys, "--config", tmp_path / "run.yaml", "--gpu", "24")
    first, same = report["rows"][0], next(r for r in report["rows"] if r["optimizer"] == "8-bit on the host")
    assert first["optimizer"] == "this run" and first["parts"] == same["parts"] and first["fits"]
    # The longest step of four of the demo's short pairs, and all of an epoch's tokens.
    assert 4 * 50 < report["row"]["tokens"] < 4 * 400 and report["epoch"]["pairs"] == 200
    assert report["epoch"]["tokens"] < report["epoch"]["pairs"] * report["row"]["tokens"] / 3
    assert report["notes"] == []

    # What does not fit gets the change that does; data that are not here are said.
    run |= {"weight_precision": "fp32", "train_data": str(tmp_path / "nowhere.jsonl")}
    del run["optim_in_backward"], run["optimizer_states"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    report = report_of(capsys, "--config", tmp_path / "run.yaml", "--gpu", "10")
    assert not report["rows"][0]["fits"] and "optim_in_backward" in report["advice"]["flags"]
    assert "nowhere.jsonl" in report["notes"][0] and report["row"]["tokens"] == 8192 and report["epoch"] is None
    assert main(["estimate", "--config", str(tmp_path / "run.yaml"), "--gpu", "10"]) == 0
    shown = capsys.readouterr().out
    assert "This run does not fit into 10.0 GiB." in shown and "The cheapest change that fits, in " in shown
    assert not (tmp_path / "out").exists()


def test_data_without_a_configuration(model, some_pairs, capsys):
    report = report_of(capsys, model, "--train_data", some_pairs, "--tokens", 512)
    assert report["row"]["tokens"] <= 512 and report["epoch"]["pairs"] == 200
    assert "this run" not in {row["optimizer"] for row in report["rows"]}


def test_a_reference_is_said(model, capsys):
    assert main(["estimate", str(model), "--objective", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "under an adapter every row is scored once more without it" in shown and "before the first step" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--objective", "kto"], "choose one of amopo"),
        (["--gpu", "here"], "this machine has no CUDA device"),
        (["--pairs", "10"], "--pairs needs --pair_tokens too"),
        (["--pair_tokens", "10"], "no effect without --pairs"),
        (["--pairs", "10", "--pair_tokens", "9", "--train_data", "x.json"], "--pairs stands beside --train_data"),
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--price", "0"], "above 0"),
        (["--tokens", "9999999999"], "a row of 9,999,999,999 tokens: at most 268,435,456"),
    ],
)
def test_errors_name_the_option(model, capsys, arguments, message):
    if arguments[:2] == ["--gpu", "here"] and __import__("torch").cuda.is_available():
        pytest.skip("there is one")
    try:
        code = main(["estimate", str(model), *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_has_to_be_named(capsys, tmp_path):
    assert main(["estimate", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["estimate"]) == 2
    assert "name one model" in capsys.readouterr().err

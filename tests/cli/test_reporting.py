"""What Trainer's report_to receives."""

import json

import pytest
from demo_folder import demo_folder

from amopo_fast.cli import main
from amopo_fast.demo.data import HELDOUT_FILE


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    demo_folder(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    board = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
    arguments = [
        "train", "--model_name_or_path", str(tmp_path / "model"), "--train_data", str(pairs), "--eval_data", str(pairs),
        "--output_dir", str(tmp_path / "run"), "--use_cpu", "--pairs_per_step", "4", "--num_train_epochs", "1",
        "--eval_strategy", "epoch", "--report_to", "tensorboard", "--save_strategy", "no",
    ]  # fmt: skip
    assert main(arguments) == 0
    events = EventAccumulator(str(board))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line if "margin/" in key or "weight/" in key or "accuracy/" in key}
    assert len(logged) >= 20
    for key in logged:
        tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
        assert tag in tags, key
    margins = [event.value for event in events.Scalars("train/margin/correctness")]
    assert margins == pytest.approx([line["margin/correctness"] for line in lines if "loss" in line], rel=1e-6)


def test_several_evaluation_sets_and_streamed_tokens(tmp_path, capsys):
    demo_folder(tmp_path / "model")
    rows = HELDOUT_FILE.read_text().splitlines()
    for name, part in (("train", rows[:12]), ("own", rows[12:16]), ("other", rows[8:14])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    losses = {}
    for streaming in ("false", "true"):
        run = tmp_path / streaming
        arguments = [
            "train", "--model_name_or_path", str(tmp_path / "model"), "--use_cpu", "--pairs_per_step", "4",
            "--train_data", str(tmp_path / "train.jsonl"), "--eval_data", str(tmp_path / "own.jsonl"),
            str(tmp_path / "other.jsonl"), "--output_dir", str(run), "--streaming", streaming, "--save_strategy", "no",
            "--num_train_epochs", "1", "--eval_strategy", "epoch", "--learning_rate", "1e-3",
        ]  # fmt: skip
        assert main(arguments) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[streaming] = [line["loss"] for line in lines if "loss" in line]
        for name in ("own", "other"):
            assert any(0 <= line.get(f"eval_{name}_accuracy/mean", -1) <= 1 for line in lines)
        assert (run / "tokens").is_dir() == (streaming == "true")
    assert losses["true"] == losses["false"] and len(losses["true"]) == 3
    assert "4 evaluation prompts are in the training data too" in capsys.readouterr().err

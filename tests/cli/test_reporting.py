"""What Trainer's report_to receives."""

import json

import pytest

from amopo_fast.cli import main
from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.demo.model import demo_model, demo_tokenizer


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    demo_model(0).save_pretrained(tmp_path / "model")
    demo_tokenizer().save_pretrained(tmp_path / "model")
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

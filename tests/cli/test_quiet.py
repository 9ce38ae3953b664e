"""One line of a run's output means one thing to its user: no library speaks in between."""

import subprocess
import sys

import pytest

from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    demo_model(0).save_pretrained(folder / "model")
    demo_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    return folder


def output_of(folder, *argv):
    done = subprocess.run([sys.executable, "-m", "amopo_fast.cli", *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_run_its_resume_and_its_evaluation(folder):
    train = ["train", "--model_name_or_path", "model", "--train_data", "pairs.jsonl", "--use_cpu", "true",
             "--pairs_per_step", "4", "--gradient_checkpointing", "true", "--output_dir", "run"]  # fmt: skip
    printed, said = output_of(folder, *train, "--max_steps", "1")
    assert said == ""
    first_words = [line.split()[0] for line in printed.splitlines()]
    assert first_words == ["pairs.jsonl:", "8", "2", "attention:", "step", "model:"]
    printed, said = output_of(folder, *train, "--max_steps", "2", "--resume_from_checkpoint", "last")
    assert said.splitlines() == ["resuming from run/checkpoint-1"]
    assert output_of(folder, "eval", "run", "--eval_data", "pairs.jsonl")[1] == ""


def test_an_adapter_and_its_merge(folder):
    _, said = output_of(
        folder, "train", "--model_name_or_path", "model", "--train_data", "pairs.jsonl", "--use_cpu", "true",
        "--pairs_per_step", "4", "--max_steps", "1", "--use_peft", "true", "--output_dir", "lora",
    )  # fmt: skip
    assert said == ""
    assert output_of(folder, "merge", "lora", "merged") == ("merged model: merged\n", "")

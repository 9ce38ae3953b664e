"""One line of a run's output means one thing to its user: no library speaks in between."""

import subprocess
import sys

import pytest
from demo_folder import demo_folder

from amopo_fast.demo.data import HELDOUT_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    demo_folder(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    return folder


SCRIPT = """
import sys
from amopo_fast.cli import main
for argv in {commands!r}:
    for stream in (sys.stdout, sys.stderr):
        print("=====", file=stream, flush=True)
    if main(argv):
        sys.exit(1)
"""


def outputs(folder, *commands):
    """[(what it printed, what it said)] of commands in one fresh process, where libraries still give their warnings."""
    code = SCRIPT.format(commands=[command.split() for command in commands])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(zip(*(text.split("=====\n")[1:] for text in (done.stdout, done.stderr)), strict=True))


def test_a_command_says_what_matters(folder):
    pytest.importorskip("jsonschema")  # eval reads the run's recipe
    train = "train --model_name_or_path model --train_data pairs.jsonl --use_cpu true --pairs_per_step 4 --beta 4"
    full = f"{train} --gradient_checkpointing true --output_dir run"
    trained, resumed, evaluated, adapted, merged = outputs(
        folder,
        f"{full} --max_steps 1",
        f"{full} --max_steps 2 --resume_from_checkpoint last",
        "eval run --eval_data pairs.jsonl",
        f"{train} --use_peft true --output_dir lora --max_steps 1",
        "merge lora merged",
    )
    first_words = [line.split()[0] for line in trained[0].splitlines()]
    assert first_words == ["pairs.jsonl:", "8", "2", "learning_rate:", "layout:", "attention:", "step", "model:"]
    assert resumed[1].splitlines() == [
        "resuming from run/checkpoint-1",
        "the learning rate follows the checkpoint's schedule to step 1, then one of 1 more steps",
    ]
    assert evaluated[1].startswith("run: layout: shared") and len(evaluated[1].splitlines()) == 1
    assert trained[1] == adapted[1] == merged[1] == ""
    assert merged[0] == "merged model: merged\n"

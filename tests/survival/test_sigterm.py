"""`amopo-fast train` as a process: SIGTERM, exit code 3, and the way back."""

import signal
import subprocess
import sys
import time

from children import child_environment

from amopo_fast.demo.data import DIMENSIONS, TRAIN_FILE
from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer


def test_sigterm_ends_with_3_and_the_run_goes_on(tmp_path):
    demo_model(0).save_pretrained(tmp_path / "model")
    demo_tokenizer().save_pretrained(tmp_path / "model")
    environment = child_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", "amopo_fast.cli", "train", "--model_name_or_path", str(tmp_path / "model"),
               "--train_data", str(TRAIN_FILE), "--dimensions", *DIMENSIONS, "--output_dir", str(tmp_path / "run"),
               "--use_cpu", "true", "--save_steps", "1000", "--pairs_per_step", "2", "--report_to", "none"]  # fmt: skip
    first = subprocess.Popen([*command, "--max_steps", "5000"], env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= 2):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 3, error
    assert "stopped by SIGTERM after step" in error and "go on with --resume_from_checkpoint last" in error
    step = int(next((tmp_path / "run").glob("checkpoint-*")).name.split("-")[1])
    again = subprocess.run([*command, "--max_steps", str(step + 1), "--resume_from_checkpoint", "last"],
                           env=environment, capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / f"checkpoint-{step + 1}" / "complete.json").exists()
    assert f"resuming from {tmp_path / 'run' / f'checkpoint-{step}'}" in again.stderr

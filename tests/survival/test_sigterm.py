"""`amopo-fast train` as a process: SIGTERM, exit code 3, and the way back."""

import signal

from children import Child, child_environment, run, until
from demo_folder import demo_folder

from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE


def test_sigterm_ends_with_3_and_the_run_goes_on(tmp_path):
    demo_folder(tmp_path / "model")
    environment = child_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    command = ["-m", "amopo_fast.cli", "train", "--model_name_or_path", str(tmp_path / "model"),
               "--train_data", str(HELDOUT_FILE), "--dimensions", *DIMENSIONS, "--output_dir", str(tmp_path / "run"),
               "--use_cpu", "true", "--save_steps", "1000", "--logging_steps", "1",
               "--pairs_per_step", "2", "--report_to", "none"]  # fmt: skip
    first = Child(*command, "--max_steps", "5000", environment=environment)
    file = tmp_path / "run" / "metrics.jsonl"
    until(lambda: file.exists() and file.read_text().count("\n") >= 2, first)
    first.send_signal(signal.SIGTERM)
    ended = first.wait(timeout=60)
    assert ended.returncode == 3, ended.stderr
    assert "stopped by SIGTERM after step" in ended.stderr
    assert "go on with --resume_from_checkpoint last" in ended.stderr
    step = int(next((tmp_path / "run").glob("checkpoint-*")).name.split("-")[1])
    again = run(*command, "--max_steps", str(step + 1), "--resume_from_checkpoint", "last", environment=environment)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / f"checkpoint-{step + 1}" / "complete.json").exists()
    assert f"resuming from {tmp_path / 'run' / f'checkpoint-{step}'}" in again.stderr

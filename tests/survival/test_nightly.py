"""What takes minutes: a thousand steps, and two runs that start in one folder, again and again."""

import ctypes
import gc
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from children import Child, child_environment
from demo_folder import demo_folder
from safetensors.torch import load_file
from small_run import small_model, small_trainer
from transformers import TrainerCallback

from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.survival.checkpoints import complete_checkpoints
from amopo_fast.survival.lock import FILE
from amopo_fast.survival.manifest import damage_of

pytestmark = pytest.mark.slow


class Held(TrainerCallback):
    """What the process holds at some steps: resident MiB, open files, threads."""

    def __init__(self, steps):
        self.steps, self.held = steps, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.held[state.global_step] = {
                "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "system threads": len(os.listdir("/proc/self/task")),
            }


@pytest.mark.parametrize("kind", ["full", "8-bit in backward"])
def test_a_thousand_steps_leak_nothing(tmp_path, record_property, kind):
    """With 11 saves, 11 evaluations and 200 log lines after what is held is first looked at: oneDNN keeps a primitive
    for each bfloat16 shape, and 600 steps take to see them. 26 KiB a step would be seen."""
    options, model = {}, small_model()
    if kind != "full":
        options = {"optim_in_backward": "adamw_8bit", "weight_precision": "bf16_stochastic",
                   "tokens_per_micro_batch": 10**6}  # fmt: skip
        model = model.to(torch.bfloat16)
    held = Held((600, 999))
    small_trainer(tmp_path, model=model, callbacks=[held], max_steps=1000, save_steps=35, logging_steps=2,
                  eval_strategy="steps", eval_steps=35, learning_rate=1e-5, **options).train()  # fmt: skip
    first, last = held.held.values()
    record_property("held", {"600": first, "999": last})
    assert last["mib"] - first["mib"] < (4 if kind == "full" else 10), (first, last)
    for name in ("files", "threads", "system threads"):
        assert last[name] <= first[name], (name, first, last)
    assert (tmp_path / "checkpoint-1000" / "trainer_state.json").stat().st_size < 2**20


def test_of_two_runs_in_one_folder_one_is_refused_and_the_other_whole(tmp_path, record_property):
    demo_folder(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    environment = child_environment(OMP_NUM_THREADS="1")
    command = ["-m", "amopo_fast.cli", "train", "--model_name_or_path", "model", "--train_data", "pairs.jsonl",
               "--dimensions", *DIMENSIONS, "--use_cpu", "true", "--pairs_per_step", "4", "--max_steps", "12",
               "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true", "--output_dir"]  # fmt: skip

    def start(folder):
        return Child(*command, folder, cwd=tmp_path, environment=environment)

    def steps(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    assert start("alone").wait(120).returncode == 0
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    refused = 0
    for trial in range(10):
        folder = f"run{trial}"
        ended = [run.wait(120) for run in [start(folder), start(folder)]]
        assert sorted(each.returncode for each in ended) == [0, 1], [each.stderr for each in ended]
        [loser] = [each.stderr for each in ended if each.returncode]
        assert "is in use by another run (process" in loser and "Traceback" not in loser
        refused += 1
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert steps(folder) == steps("alone") and not (tmp_path / folder / FILE).exists()
        whole = complete_checkpoints(tmp_path / folder)
        assert [each.step for each in whole] == [each.step for each in complete_checkpoints(tmp_path / "alone")]
        assert not any(damage_of(each.path) for each in whole)
        assert not (tmp_path / folder / "superseded").exists()
    record_property("counts", {"trials": refused})

"""Runs killed by SIGKILL and resumed until they are done, against one that was left alone.

    python tests/survival/kill_runs.py [--runs 20] [--while_saving 5] [--seed 0] [--device cuda] [--host]

Every attempt is a process of its own, forked from one that has imported torch, and killed from outside: at a random
moment of the run, or a random moment after a save began. Ends with one line per run and exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# Else asking whether there is a GPU initialises CUDA, which no forked process can use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch
from safetensors.torch import load_file
from small_run import small_model, small_trainer

from amopo_fast.survival.checkpoints import STAGING, checkpoints_in, complete_checkpoints

TIMED = ("tokens_per_second", "pairs_per_second", "sequences_per_second", "memory/", "train_runtime",
         "train_samples_per", "train_steps_per", "eval_runtime", "eval_samples_per", "eval_steps_per")  # fmt: skip


# On a GPU attention runs in torch's variable-length kernel, which has no dropout and adds gradients in any order unless
# asked otherwise.
ON_A_GPU = {"use_cpu": False, "bf16": True, "full_determinism": True}
IN_HOST_MEMORY = {"weights": "host", "optimizer_states": "host", "optim_in_backward": "adamw_8bit",
                  "tokens_per_micro_batch": 10**6}  # fmt: skip


def child(output_dir: Path, device: str, host: bool) -> int:
    """Fork a process that trains in `output_dir`, from its newest checkpoint if there is one. Returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        cuda = device == "cuda"
        run = small_trainer(
            output_dir, model=small_model(attention_dropout=0.0 if cuda else 0.1, num_hidden_layers=4 if host else 2),
            **(ON_A_GPU if cuda else {}), **(IN_HOST_MEMORY if host else {}),
        )  # fmt: skip
        run.train(resume_from_checkpoint="auto")
        run.save_model()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float) -> bool:
    """Whether it was still running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    return wait(process) == -signal.SIGKILL


def kill_while_saving(process: int, output_dir: Path, save: int, delay: float) -> bool:
    """Kill `delay` seconds after the staging folder appears for the `save`-th time."""
    seen, present = 0, False
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        now = (output_dir / STAGING).exists()
        seen += now and not present
        present = now
        if seen == save:
            return kill_after(process, delay)
        time.sleep(0.0002)
    return wait(process) == -signal.SIGKILL


def interrupted_save(output_dir: Path) -> bool:
    return (output_dir / STAGING).exists() or any(checkpoint.problem for checkpoint in checkpoints_in(output_dir))


def untimed(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def result(output_dir: Path) -> dict:
    """Everything that must be equal, as strings and tensors."""
    last = complete_checkpoints(output_dir)[-1].path
    loaded = {name: torch.load(last / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    state = json.loads((last / "trainer_state.json").read_text())
    return {
        "weights": load_file(output_dir / "model.safetensors"),
        "optimizer": loaded["optimizer.pt"],
        "scheduler": loaded["scheduler.pt"],
        "random state": (last / "rng_state.pth").read_bytes(),
        "logged": untimed(state["log_history"]),
        "metrics file": untimed([json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]),
        "checkpoints": [checkpoint.step for checkpoint in complete_checkpoints(output_dir)],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--while_saving", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--host", action="store_true", help="weights and optimizer states in host memory")
    options = parser.parse_args()
    machine = (options.device, options.host)
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    failures = caught = caught_saving = 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        start = time.monotonic()
        assert wait(child(alone, *machine)) == 0, alone.with_suffix(".log").read_text()
        duration = time.monotonic() - start
        expected = result(alone)
        saves = len(range(2, expected["logged"][-1]["step"] + 1, 2))
        run = 0
        while caught < options.runs or caught_saving < options.while_saving:
            output_dir = Path(folder) / f"run{run}"
            aim_at_save = caught_saving < options.while_saving
            process = child(output_dir, *machine)
            if aim_at_save:
                killed = kill_while_saving(process, output_dir, rng.randint(1, saves), rng.uniform(0, 0.05))
            else:
                killed = kill_after(process, rng.uniform(0.1, 0.8) * duration)
            saving = killed and interrupted_save(output_dir)
            at = max((checkpoint.step for checkpoint in complete_checkpoints(output_dir)), default=0)
            caught += killed
            caught_saving += saving
            assert wait(child(output_dir, *machine)) == 0, output_dir.with_suffix(".log").read_text()
            found = result(output_dir)
            different = [key for key in expected if not same(expected[key], found[key])]
            failures += bool(different)
            print(
                f"run {run}: {'killed' if killed else 'not killed: it was done'}{' while saving' if saving else ''}, "
                f"resumed from step {at}, {'DIFFERENT: ' + ', '.join(different) if different else 'equal'}",
                flush=True,
            )
            run += 1
    print(f"{caught} runs killed, {caught_saving} of them while saving, {failures} different")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

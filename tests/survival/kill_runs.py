"""Runs killed by SIGKILL, or sent SIGTERM, and resumed until they are done, against one that was left alone.

    python tests/survival/kill_runs.py [--kills 20] [--while_saving 5] [--kills_of_a_run 1] [--signal SIGTERM]
        [--variants all] [--seed 0] [--device cuda] [--out FILE.json]

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

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
# Else asking whether there is a GPU initialises CUDA, which no forked process can use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch
from safetensors.torch import load_file
from small_run import small_model, small_pairs, small_trainer

from amopo_fast.models.streaming import stream_weights
from amopo_fast.prompts.store import TokenStore
from amopo_fast.survival.checkpoints import STAGING, checkpoints_in, complete_checkpoints
from harness import Report

TIMED = ("tokens_per_second", "pairs_per_second", "sequences_per_second", "memory/", "train_runtime",
         "train_samples_per", "train_steps_per", "eval_runtime", "eval_samples_per", "eval_steps_per")  # fmt: skip


# On a GPU attention runs in torch's variable-length kernel, which has no dropout and adds gradients in any order unless
# asked otherwise.
ON_A_GPU = {"use_cpu": False, "bf16": True, "full_determinism": True}
ONE_MICRO_BATCH = {"tokens_per_micro_batch": 10**6}
IN_HOST_MEMORY = {**ONE_MICRO_BATCH, "weights": "host", "optimizer_states": "host", "optim_in_backward": "adamw_8bit"}
VARIANTS = {  # options of a run, whose steps are several micro-batches unless it says otherwise
    "full": {},
    "one micro-batch": ONE_MICRO_BATCH,
    "8-bit in backward": {**ONE_MICRO_BATCH, "weight_precision": "bf16_stochastic", "optim_in_backward": "adamw_8bit"},
    "4-bit in backward": {**ONE_MICRO_BATCH, "weight_precision": "bf16_stochastic", "optim_in_backward": "adamw_4bit"},
    "LoRA": {},
    "DoRA": {},
    "tokens on disk": {},
    "host memory, 2 slots": {**IN_HOST_MEMORY, "slots": 2},
    "host memory, 3 slots": {**IN_HOST_MEMORY, "slots": 3},
    "host memory, 5 slots": {**IN_HOST_MEMORY, "slots": 5},
    "best model": {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
                   "metric_for_best_model": "eval_loss"},
}  # fmt: skip
# A checkpoint of a stop is one more, and where the last step was stopped it lies before the run's last evaluation.
OF_CHECKPOINTS = ("random state", "logged", "checkpoints")
STOPPED = 3  # the exit code of a run that a signal stopped between two steps


def trainer_of(variant: str, output_dir: Path, device: str):
    """A small run of VARIANTS."""
    options = VARIANTS[variant] | (ON_A_GPU if device == "cuda" else {})
    slots = options.pop("slots", 0)
    model = small_model(attention_dropout=0.0 if device == "cuda" else 0.1, num_hidden_layers=slots + 2)
    if "weight_precision" in options:
        model = model.to(torch.bfloat16)
    if slots:
        stream_weights(model, torch.device(device), slots=slots)
    if variant in ("LoRA", "DoRA"):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, use_dora=variant == "DoRA"
        )
    if variant == "tokens on disk":
        options["pairs"] = TokenStore.write(output_dir.with_suffix(f".tokens{os.getpid()}"), small_pairs(14))
    return small_trainer(output_dir, model=model, **options)


def child(output_dir: Path, device: str, variant: str) -> int:
    """Fork a process that trains in `output_dir`, from its newest checkpoint if there is one. Returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run = trainer_of(variant, output_dir, device)
        run.train(resume_from_checkpoint="auto")
        if not run.checkpointer.stopped:
            run.save_model()
        status = STOPPED if run.checkpointer.stopped else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float, sent: signal.Signals = signal.SIGKILL) -> bool:
    """Whether it was still running and the signal ended it; SIGTERM ends it at once where training has not begun."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0005)
    os.kill(process, sent)
    return wait(process) in (-sent, STOPPED)


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
    [weights] = output_dir.glob("*model.safetensors")
    return {
        "weights": load_file(weights),
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


def chain(variant: str, output_dir: Path, options, rng, duration: float, saves: int, aims: int) -> tuple[int, int]:
    """Kill a run some times, up to `aims` of them while it saves, and let it end: (kills, those in a save)."""
    caught = saving = 0
    for _ in range(rng.randint(1, options.kills_of_a_run)):
        process = child(output_dir, options.device, variant)
        if saving < aims:
            killed = kill_while_saving(process, output_dir, rng.randint(1, saves), rng.uniform(0, 0.05))
        else:
            killed = kill_after(process, rng.uniform(0.1, 0.8) * duration, signal.Signals[options.signal])
        caught += killed
        saving += killed and interrupted_save(output_dir)
    ended = wait(child(output_dir, options.device, variant))
    assert ended == 0, output_dir.with_suffix(".log").read_text()
    return caught, saving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of runs that were not done yet")
    parser.add_argument("--while_saving", type=int, default=5, help="those that must hit a save")
    parser.add_argument("--kills_of_a_run", type=int, default=1, help="at most, before it may end")
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL", help="outside of saves")
    parser.add_argument("--variants", nargs="+", choices=("all", *VARIANTS), default=["full"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file with a row for each kind of run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    variants = list(VARIANTS) if "all" in options.variants else options.variants
    expected, seconds = {}, {}
    counted = ("runs", "kills", "while_saving", "different")
    total = dict.fromkeys(counted, 0)
    rows = {variant: dict.fromkeys(counted, 0) for variant in variants}
    report = Report("kill_runs", options) if options.out else None
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(variants):
            alone, start = Path(folder) / f"alone{number}", time.monotonic()
            assert wait(child(alone, options.device, variant)) == 0, alone.with_suffix(".log").read_text()
            expected[variant], seconds[variant] = result(alone), time.monotonic() - start
        while total["kills"] < options.kills or total["while_saving"] < options.while_saving:
            variant, output_dir = variants[total["runs"] % len(variants)], Path(folder) / f"run{total['runs']}"
            # A run that is killed several times is to be in its middle still when the last one comes.
            saves = max(1, expected[variant]["checkpoints"][-1] // 2 // options.kills_of_a_run)
            aims = options.while_saving - total["while_saving"]
            kills, saving = chain(variant, output_dir, options, rng, seconds[variant], saves, aims)
            found = result(output_dir)
            compared = [key for key in found if options.signal == "SIGKILL" or key not in OF_CHECKPOINTS]
            different = [key for key in compared if not same(expected[variant][key], found[key])]
            for name, count in zip(counted, (1, kills, saving, len(different) > 0), strict=True):
                total[name] += count
                rows[variant][name] += count
            said = f"DIFFERENT: {', '.join(different)}" if different else "equal"
            print(f"{variant}: {kills} kills, {saving} of them while saving, {said}", flush=True)
            if report is not None:
                status = "wrong: a run differs" if rows[variant]["different"] else "ok"
                report.put(variant, case=variant, status=status, **rows[variant])
    print("{kills} kills of {runs} runs, {while_saving} while saving, {different} different".format(**total))
    return 1 if total["different"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Spreads the suite over a few processes where pytest-xdist is there, unless the command line says how many.

Not on a machine with a GPU, which its tests would fight for. A process takes a file at a time: those that take longest
come first, so that none is left to one process at the end.
"""

import importlib.util
import os
import shutil

import pytest

PROCESSES = 4  # each imports torch and transformers: about 1 GB
# By seconds of a core: those above ten when this was written.
LONGEST = (
    "memory/test_estimate.py", "training/test_options.py", "kernels/head/test_compiling_head.py",
    "benchmarks/test_smoke.py", "models/test_kinds.py", "survival/test_distributed.py",
    "survival/test_checkpoints.py", "memory/test_advice.py", "models/test_faster_layers.py",
    "cli/test_estimate_command.py", "models/test_families.py", "demo/test_demo.py", "evaluation/test_prompted.py",
    "survival/test_resume_policy.py", "survival/test_guard.py", "cli/test_quiet.py", "kernels/head/test_triton_head.py",
    "kernels/test_compiling_small_kernels.py", "evaluation/test_smollm2.py", "models/test_streaming.py",
    "prompts/test_contract.py", "memory/test_estimate_of_types.py", "kernels/head/test_head_operators.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(args):
    options = ("-n", "--numprocesses", "--collect-only", "--co", "no:xdist", "-pno:xdist")
    asked = any(argument.startswith(options) for argument in args)
    if asked or shutil.which("nvidia-smi") or not importlib.util.find_spec("xdist"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if min(cores, PROCESSES) > 1:
        args[:] = ["-n", str(min(cores, PROCESSES)), "--dist", "loadfile", "--no-loadscope-reorder", *args]


def pytest_collection_modifyitems(config, items):
    place = {str(config.rootpath / "tests" / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))

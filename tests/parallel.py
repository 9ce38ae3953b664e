"""Spreads the suite over a few processes where pytest-xdist is there, unless the command line says how many.

Not on a machine with a GPU, which its tests would fight for.
"""

import importlib.util
import os
import shutil

import pytest

PROCESSES = 4  # each imports torch and transformers: about 1 GB


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(args):
    words = ("-n", "--numprocesses", "--collect-only", "--co", "no:xdist", "-pno:xdist")
    asked = any(argument.startswith(words) for argument in args)
    if asked or shutil.which("nvidia-smi") or not importlib.util.find_spec("xdist"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if min(cores, PROCESSES) > 1:
        args[:] = ["-n", str(min(cores, PROCESSES)), "--dist", "loadfile", *args]

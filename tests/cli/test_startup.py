"""What a command does not need, it does not import: benchmarks/startup.py has the seconds."""

import subprocess
import sys

import pytest

from amopo_fast.cli.options import RUN_CLASSES, field_names
from amopo_fast.demo.data import HELDOUT_FILE

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "torch._dynamo", "matplotlib", "datasets",
         "triton")  # fmt: skip
READING = tuple(name for name in HEAVY if name != "transformers")


def loaded_by(statement):
    """Names of HEAVY modules in a fresh process after a statement."""
    code = f"import sys\n{statement}\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded:")[1].split())


def command(*argv):
    return f"from amopo_fast.cli import main\ntry:\n    main({list(argv)!r})\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import amopo_fast", HEAVY),
        (command("--help"), HEAVY),
        (command("--version"), HEAVY),
        (command("validate", str(HELDOUT_FILE)), READING),
        (command("show", str(HELDOUT_FILE)), READING),
    ],
    ids=["import", "help", "version", "validate", "show"],
)
def test_nothing_heavy_is_imported(statement, forbidden):
    found = loaded_by(statement) & set(forbidden)
    if found and "torch" in loaded_by("from transformers import PreTrainedTokenizerFast"):
        pytest.skip("this version of transformers imports torch with its tokenizers")
    assert not found


def test_importing_the_kernels_and_optimizers_compiles_and_imports_little():
    assert not loaded_by("import amopo_kernels, amopo_fast.optim") & (set(HEAVY) - {"torch", "triton"})


@pytest.mark.parametrize("place", RUN_CLASSES)
def test_field_names_are_those_of_the_class(place):
    import dataclasses
    import importlib

    module, name = place.split(":")
    each = getattr(importlib.import_module(module), name)
    here = vars(each)["__annotations__"]
    assert {field.name for field in dataclasses.fields(each) if field.init and field.name in here} <= field_names(place)

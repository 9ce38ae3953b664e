"""Runs killed at random moments, while saving and before each of their file operations end as the run that was left
alone, bit for bit and with the same files."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from children import child_environment, run
from kill_runs import result, same
from small_run import small_trainer

from amopo_fast.survival import durable
from amopo_fast.survival.lock import FILE

SCRIPT = Path(__file__).with_name("kill_runs.py")


def attack(*options):
    """(kills, runs, kills in a save) of `kill_runs.py`, none of whose runs may differ."""
    done = run(str(SCRIPT), *map(str, options), environment=child_environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) kills of (\d+) runs, (\d+) while saving, 0 different", done.stdout)
    return tuple(map(int, counts.groups()))


def test_killed_runs_end_as_the_uninterrupted_one():
    kills, runs, saving = attack("--kills", 3, "--while_saving", 1)
    assert kills >= 3 and saving >= 1 and runs >= 3


@pytest.mark.slow
def test_104_kills_of_every_kind_of_run(record_property):
    kills, runs, saving = attack("--kills", 104, "--while_saving", 56, "--kills_of_a_run", 4, "--variants", "all")
    assert kills >= 104 and saving >= 56
    record_property("counts", {"kills": kills, "runs": runs, "while_saving": saving})


@pytest.mark.slow
def test_10_times_sigterm(record_property):
    kills, runs, _ = attack("--kills", 10, "--while_saving", 0, "--signal", "SIGTERM", "--variants", "all")
    assert kills >= 10
    record_property("counts", {"sigterms": kills, "runs": runs})


def test_the_page_has_the_counts_of_the_attack_on_record():
    root = SCRIPT.parents[2]
    page = " ".join((root / "docs" / "checkpoints.md").read_text(encoding="utf-8").split())
    for name, sentence in (("kill_runs-cpu", "{kills} SIGKILLs of {runs} runs, {while_saving} while saving,"),
                           ("kill_runs_sigterm-cpu", "and {kills} SIGTERMs of {runs} runs")):  # fmt: skip
        rows = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
        total = {key: sum(row[key] for row in rows) for key in ("kills", "runs", "while_saving", "different")}
        assert sentence.format(**total) in page and total["different"] == 0 and f"{name}.json" in page


OPERATIONS = ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (torch, "save"), (durable, "append"),
              (transformers.modeling_utils, "safe_save_file"))  # fmt: skip
EVERY_STEP = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss",
              "learning_rate": 3e-3}  # fmt: skip
KINDS = {  # options; the newest checkpoint and the one that its save makes one too many
    "first is best": ({**EVERY_STEP, "num_train_epochs": 1, "save_total_limit": 2, "load_best_model_at_end": True,
                       "greater_is_better": False}, (4, 3)),
    # Nothing is left to train after step 3, in the middle of an epoch, and its loss is not logged.
    "inside an epoch": ({"save_steps": 1, "max_steps": 3, "save_total_limit": 1, "logging_steps": 2}, (3, 2)),
}  # fmt: skip
POINTS = {  # what a kill comes before, in the last save or after it
    "a file of it": "save .saving/checkpoint-NEW/optimizer.pt",
    "its marker": "replace .saving/checkpoint-NEW/.writing-complete.json",
    "its name": "replace .saving/checkpoint-NEW",
    "clearing up": "rmdir .saving",
    "rotation": "replace checkpoint-OLD",
    "the end of a deletion": "rmdir .removing-checkpoint-OLD",
    "the last line of metrics": "append metrics.jsonl",
    "the final model": "mkdir .saving/model",
    "its weights": "safe_save_file .saving/model/model.safetensors",
    "moving them": "replace .saving/model/model.safetensors",
    "moving its configuration": "replace .saving/model/config.json",
}


@contextmanager
def copies_before(folder, copies, wanted=None):
    """Inside, yields {file operation: copy of `folder` before it}: what a kill leaves. Of an operation that is repeated
    the last one counts; `wanted` names the operations, by default all."""
    found = {}

    def watched(name, real):
        def call(*args, **options):
            paths = [os.fspath(each) for each in args if isinstance(each, (str, os.PathLike))]
            if paths and options.get("dir_fd") is not None:  # in shutil.rmtree
                paths[0] = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), paths[0])
            operation = f"{name} {os.path.relpath(paths[0], folder)}" if paths else ""
            if paths and paths[0].startswith(f"{folder}/") and (wanted is None or operation in wanted):
                found[operation] = copies / f"{len(list(copies.iterdir()))}"
                shutil.copytree(folder, found[operation], ignore=shutil.ignore_patterns(FILE))
            return real(*args, **options)

        return call

    copies.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, watched(name, getattr(module, name)))
        yield found


def of_kind(kind, point):
    new, old = KINDS[kind][1]
    return POINTS[point].replace("NEW", str(new)).replace("OLD", str(old))


def ends(kind, folder):
    """Go on, or begin, and save the model: (names of files and folders, contents)."""
    trainer = small_trainer(folder, **KINDS[kind][0])
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_final()
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}, result(folder)


def differences(expected, found):
    return sorted(expected[0] ^ found[0]), [key for key in expected[1] if not same(expected[1][key], found[1][key])]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """(how it ends, {operation: what a kill before it leaves}) of a kind of run."""

    @cache
    def of(kind):
        folder = tmp_path_factory.mktemp("alone") / "run"
        with copies_before(folder, folder.with_name("killed"), {of_kind(kind, point) for point in POINTS}) as killed:
            return ends(kind, folder), killed

    return of


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_before_an_operation_ends_with_the_same_files(left_alone, tmp_path, kind, point):
    expected, killed = left_alone(kind)
    folder = Path(shutil.copytree(killed[of_kind(kind, point)], tmp_path / "run"))
    assert differences(expected, ends(kind, folder)) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_kill_in_a_deletion_leaves_as_little(left_alone, tmp_path, kind):
    expected, killed = left_alone(kind)
    folder = Path(shutil.copytree(killed[of_kind(kind, "rotation")], tmp_path / "run"))
    points = [of_kind(kind, point) for point in ("rotation", "the end of a deletion")]
    with copies_before(folder, tmp_path / "killed", points) as again:
        assert differences(expected, ends(kind, folder)) == ([], [])
    for point in points:
        assert differences(expected, ends(kind, again[point])) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_before_every_operation(tmp_path, kind):
    """One before the first checkpoint begins anew, and keeps the metrics that there are."""
    with copies_before(tmp_path / "run", tmp_path / "killed") as killed:
        expected = ends(kind, tmp_path / "run")
    assert len(killed) > 60
    for operation, folder in killed.items():
        names, contents = differences(expected, ends(kind, folder))
        assert not contents and {Path(name).parts[0] for name in names} <= {"superseded"}, operation
        assert not names or not list(folder.glob("superseded/*/checkpoint-*")), operation

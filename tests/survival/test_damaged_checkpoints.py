"""Every kind of damage to a checkpoint is found before anything of it is loaded, named, and gone around."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from payloads import Evil
from safetensors.torch import load_file
from small_run import small_trainer
from transformers import TrainerCallback

from amopo_fast.errors import CheckpointError
from amopo_fast.survival import manifest
from amopo_fast.survival.checkpoints import complete_checkpoints, resolve
from amopo_fast.survival.manifest import MARKER, damage_of, lacking, make_manifest, problem_of, read_marker, sealed

OPTIONS = {"max_steps": 3, "save_steps": 1, "save_total_limit": None, "eval_strategy": "no"}
NEWEST, OLDER = "checkpoint-3", "checkpoint-2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run = small_trainer(folder, **OPTIONS)
    run.train()
    run.save_model()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path, position, bit=0x40):
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def zero(name):
    def damage(folder):
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))

    return damage


def flipped(name, position):
    return lambda folder: flip(folder / name, position)


def truncated(name, left=0.5):
    return lambda folder: os.truncate(folder / name, int(left * (folder / name).stat().st_size))


def missing(name):
    return lambda folder: (folder / name).unlink()


def replaced(make):
    """What `make` puts in the place of a file."""

    def of(name):
        return lambda folder: [(folder / name).unlink(), make(folder / name)]

    return of


piped, foldered = replaced(os.mkfifo), replaced(os.mkdir)
linked = replaced(lambda path: path.symlink_to("nowhere"))


def of_another(name):
    return lambda folder: shutil.copy(folder.parent / OLDER / name, folder / name)


def marked(change):
    """`change` edits the marker's content, or returns another."""

    def damage(folder):
        content = read_marker(folder)
        content = change(content) or content
        (folder / MARKER).write_text(content if isinstance(content, str) else sealed(content))

    return damage


def respelled(word):
    """One bit of the last character of a key or value that the marker has."""

    def damage(folder):
        content = (folder / MARKER).read_bytes()
        flip(folder / MARKER, content.rindex(f'{word}"'.encode()) + len(word) - 1, 0x01)

    return damage


def crafted(name, content):
    """The file has other content, and the marker says that it was saved so."""

    def damage(folder):
        old = folder / name
        old.write_bytes(content(old) if callable(content) else content)
        marker = read_marker(folder)
        (folder / MARKER).write_text(sealed(make_manifest_of(folder, marker)))

    return damage


def make_manifest_of(folder, marker):
    (folder / MARKER).unlink()
    return make_manifest(folder, **{key: value for key, value in marker.items() if key != "files"})


EVIL = pickle.dumps(Evil("owned"))
DAMAGE = {
    "a zeroed optimizer": (zero("optimizer.pt"), "optimizer.pt was changed"),
    "zeroed weights": (zero("model.safetensors"), "model.safetensors was changed"),
    "a zeroed scheduler": (zero("scheduler.pt"), "scheduler.pt was changed"),
    "a zeroed random state": (zero("rng_state.pth"), "rng_state.pth was changed"),
    "a zeroed state of ours": (zero("amopo_state_0.pt"), "amopo_state_0.pt was changed"),
    "a bit of the weights": (flipped("model.safetensors", -3), "model.safetensors was changed"),
    "a bit of the weights' header": (flipped("model.safetensors", 20), "model.safetensors was changed"),
    "a bit of the header's length": (flipped("model.safetensors", 1), "model.safetensors was changed"),
    "a bit of the optimizer": (flipped("optimizer.pt", 4000), "optimizer.pt was changed"),
    "a bit of the optimizer's first bytes": (flipped("optimizer.pt", 0), "optimizer.pt was changed"),
    "a bit of Trainer's state": (flipped("trainer_state.json", 40), "trainer_state.json was changed"),
    "a bit of the configuration": (flipped("config.json", 10), "config.json was changed"),
    "cut weights": (truncated("model.safetensors"), r"model.safetensors has \d+ bytes, \d+ were written"),
    "an empty optimizer": (truncated("optimizer.pt", 0), r"optimizer.pt has 0 bytes, \d+ were written"),
    "no weights": (missing("model.safetensors"), "model.safetensors is missing"),
    "no optimizer": (missing("optimizer.pt"), "optimizer.pt is missing"),
    "no random state": (missing("rng_state.pth"), "rng_state.pth is missing"),
    "no state of Trainer": (missing("trainer_state.json"), "trainer_state.json is missing"),
    "another step's weights": (of_another("model.safetensors"), "model.safetensors was changed"),
    "another step's optimizer": (of_another("optimizer.pt"), "optimizer.pt was changed"),
    "another step's marker": (of_another(MARKER), "its complete.json is of step 2"),
    "a foreign pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(EVIL),
        "pytorch_model.bin was not part of the save",
    ),
    "a foreign adapter": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors"),
        "adapter_model.safetensors was not part of the save",
    ),
    "no marker": (missing(MARKER), "it has no complete.json: saving it was cut off"),
    "a pipe for a marker": (piped(MARKER), "it has no complete.json"),
    "a pipe for the optimizer": (piped("optimizer.pt"), "optimizer.pt is missing"),
    "a folder for the weights": (foldered("model.safetensors"), "model.safetensors is missing"),
    "a folder for a marker": (foldered(MARKER), "it has no complete.json"),
    "a link to nowhere": (linked("optimizer.pt"), "optimizer.pt is missing"),
    "a cut marker": (marked(lambda c: '{"step": 3, "fil'), "its complete.json cannot be read .JSONDecodeError"),
    "a marker of bytes": (lambda folder: (folder / MARKER).write_bytes(b"\xff\xfe"), "cannot be read .UnicodeDecode"),
    "a marker that nests": (marked(lambda c: "[" * 10**5), "its complete.json cannot be read .RecursionError"),
    "a list for a marker": (marked(lambda c: "[]"), "was not written by a save: the file: .. is not of type 'object'"),
    "a number for a marker": (marked(lambda c: "3"), "was not written by a save: the file: 3"),
    "an option's name in the marker": (respelled("beta"), "its complete.json was changed since it was saved"),
    "an option's value in the marker": (respelled("cosine"), "its complete.json was changed since it was saved"),
    "the name of the marker's checksum": (respelled("xxh3"), "its complete.json was changed since it was saved"),
    "the name of the marker's format": (respelled("format"), "its complete.json was changed since it was saved"),
    "a marker written anew": (marked(lambda c: json.dumps(c)), "its complete.json was changed since it was saved"),
    "a marker of a later version": (marked(lambda c: c.update(format=3)), "by a save: format: 2 was expected"),
    "no files listed": (marked(lambda c: c.update(files={})), "does not list trainer_state.json"),
    "files as a list": (marked(lambda c: c.update(files=list(c["files"]))), "by a save: files: "),
    "sizes alone": (
        marked(lambda c: c.update(files={name: each["bytes"] for name, each in c["files"].items()})),
        "by a save: files.",
    ),
    "a size as text": (marked(lambda c: c["files"]["optimizer.pt"].update(bytes="9")), "files.optimizer.pt.bytes: '9'"),
    "a negative size": (marked(lambda c: c["files"]["optimizer.pt"].update(bytes=-1)), "files.optimizer.pt.bytes: -1"),
    "a checksum of nothing": (marked(lambda c: c["files"]["optimizer.pt"].update(xxh3=None)), "pt.xxh3: None"),
    "the optimizer not listed": (marked(lambda c: c["files"].pop("optimizer.pt") and c), "does not list optimizer.pt"),
    "the weights not listed": (marked(lambda c: c["files"].pop("model.safetensors") and c), "does not list model.safe"),
    "our state not listed": (marked(lambda c: c["files"].pop("amopo_state_0.pt") and c), "list amopo_state_0.pt"),
    "a file of elsewhere": (
        marked(lambda c: c["files"].update({"../checkpoint-2/optimizer.pt": c["files"]["optimizer.pt"]})),
        "lists ../checkpoint-2/optimizer.pt, which is outside of the folder",
    ),
    "an absolute path": (
        marked(lambda c: c["files"].update({"/etc/hostname": c["files"]["optimizer.pt"]})),
        "lists /etc/hostname, which is outside of the folder",
    ),
    "another step": (marked(lambda c: c.update(step=7)), "is of step 7"),
    "a step as text": (marked(lambda c: c.update(step="3")), "by a save: step: '3' is not of type 'integer'"),
    "no ranks": (marked(lambda c: c.update(world_size=0)), "by a save: world_size: 0"),
    "true ranks": (marked(lambda c: c.update(world_size=True)), "by a save: world_size: True"),
    "more ranks than saved": (marked(lambda c: c.update(world_size=2)), "does not list amopo_state_1.pt"),
    "a word for a truth": (marked(lambda c: c.update(model_only="no")), "by a save: model_only: 'no'"),
    "a list for the fingerprint": (marked(lambda c: c.update(fingerprint=[])), "by a save: fingerprint: "),
    "numbers in the fingerprint": (marked(lambda c: c.update(fingerprint={"model": 3})), "fingerprint.model: 3"),
    "no fingerprint": (marked(lambda c: c.pop("fingerprint") and c), "'fingerprint' is a required property"),
    "a crafted pickle": (crafted("optimizer.pt", EVIL), "optimizer.pt cannot be read without running"),
    "a crafted random state": (crafted("rng_state.pth", EVIL), "rng_state.pth cannot be read without"),
    "text for the optimizer": (crafted("optimizer.pt", b"no tensors"), "optimizer.pt cannot be read without running"),
    "crafted weights": (crafted("model.safetensors", bytes(64)), "model.safetensors cannot be read"),
    "Trainer's state of another step": (
        crafted("trainer_state.json", lambda old: (old.parents[1] / OLDER / old.name).read_bytes()),
        "its trainer_state.json is of step 2, not 3",
    ),
    "a list for Trainer's state": (crafted("trainer_state.json", b"[]"), "trainer_state.json .* of another form"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(copy, caplog, monkeypatch, name):
    monkeypatch.chdir(copy)
    damage, reason = DAMAGE[name]
    damage(copy / NEWEST)
    for word in ("last", "auto"):
        caplog.clear()
        assert resolve(copy, word) == copy / OLDER
        assert f"resuming from {copy / OLDER}" in caplog.text
    with pytest.raises(CheckpointError, match=f"{NEWEST} cannot be resumed: .*{reason}"):
        resolve(copy, str(copy / NEWEST))
    assert f"skipped {copy / NEWEST}: " in caplog.text and "weights_only" not in caplog.text
    assert not (copy / "owned").exists()


CUTS = {"empty": lambda size: 0, "cut in half": lambda size: size // 2, "without its last byte": lambda size: size - 1,
        "missing": None}  # fmt: skip


def test_of_every_file_that_is_cut_or_missing_the_checkpoint_before_is_taken(copy, caplog, record_property):
    files = sorted(path for path in (copy / NEWEST).rglob("*") if path.is_file())
    assert {path.name for path in files} > {MARKER, "model.safetensors", "optimizer.pt", "trainer_state.json"}
    for path in files:
        content = path.read_bytes()
        for name, size in CUTS.items():
            path.unlink() if size is None else path.write_bytes(content[: size(len(content))])
            caplog.clear()
            for word in ("last", "auto"):
                assert resolve(copy, word) == copy / OLDER, f"{path.name} {name}"
            assert f"skipped {copy / NEWEST}: " in caplog.text and path.name in caplog.text, f"{path.name} {name}"
            path.write_bytes(content)
            assert damage_of(copy / NEWEST) == "", f"{path.name} {name}"
    record_property("counts", {"files": len(files), "cut or missing": len(files) * len(CUTS)})


def test_a_bit_of_any_byte_of_the_marker_is_seen(copy):
    whole = (copy / NEWEST / MARKER).read_bytes()
    rng = np.random.default_rng(0)
    for position in (*rng.choice(len(whole), 40, replace=False), 0, len(whole) - 1):
        flip(copy / NEWEST / MARKER, position, 1 << rng.integers(8))
        assert problem_of(copy / NEWEST), whole[max(0, position - 20) : position + 20]
        (copy / NEWEST / MARKER).write_bytes(whole)
    assert problem_of(copy / NEWEST) == ""


def test_a_marker_of_before_it_had_a_checksum_of_itself_is_read(copy):
    content = {key: value for key, value in read_marker(copy / NEWEST).items() if key not in ("format", "xxh3")}
    (copy / NEWEST / MARKER).write_text(json.dumps(content))
    assert resolve(copy, "last") == copy / NEWEST


def test_undamaged_checkpoints_are_whole(copy):
    assert [damage_of(each.path) for each in complete_checkpoints(copy)] == ["", "", ""]
    (copy / NEWEST / "notes.txt").write_text("a user's own file harms nothing")
    shutil.move(copy / NEWEST, copy / "best")
    assert damage_of(copy / "best") == ""


def test_a_checkpoint_is_no_output_dir(copy):
    with pytest.raises(CheckpointError, match=f"output_dir .*{NEWEST} is a checkpoint, .* name another folder"):
        small_trainer(copy / NEWEST).train()
    assert damage_of(copy / NEWEST) == ""


def test_a_disk_that_cannot_be_read_is_damage(copy, monkeypatch):
    read = manifest._checksum

    def failing(path):
        if path == copy / NEWEST / "optimizer.pt":
            raise OSError(5, "Input/output error", path)
        return read(path)

    monkeypatch.setattr(manifest, "_checksum", failing)
    assert resolve(copy, "auto") == copy / OLDER
    assert damage_of(copy / NEWEST) == "optimizer.pt cannot be read (Input/output error)"


def test_a_queued_run_goes_on_from_before_the_damage_and_ends_the_same(finished, copy):
    zero("optimizer.pt")(copy / NEWEST)
    run = small_trainer(copy, **OPTIONS)
    run.train(resume_from_checkpoint="auto")
    run.save_model()
    expected, found = (load_file(folder / "model.safetensors") for folder in (finished, copy))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert damage_of(copy / NEWEST) == ""


def test_what_loads_but_is_not_this_runs_is_a_checkpoint_error(copy):
    state = torch.load(copy / NEWEST / "optimizer.pt", weights_only=True)
    state["param_groups"].pop()
    torch.save(state, copy / NEWEST / "optimizer.pt")
    marker = read_marker(copy / NEWEST)
    (copy / NEWEST / MARKER).write_text(sealed(make_manifest_of(copy / NEWEST, marker)))
    run = small_trainer(copy, **{**OPTIONS, "max_steps": 4})
    with pytest.raises(CheckpointError, match="checkpoint-3 cannot be loaded: ValueError: loaded state dict"):
        run.train(resume_from_checkpoint="last")


class RemoveWeights(TrainerCallback):
    """What another run in the same folder does between a save and its publication."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            original = self.trainer.checkpointer._state

            def state_and_loss():
                (Path(args.output_dir) / ".saving" / "checkpoint-2" / "model.safetensors").unlink()
                return original()

            self.trainer.checkpointer._state = state_and_loss


def test_a_save_that_lost_a_file_is_not_published(tmp_path):
    callback = RemoveWeights()
    run = callback.trainer = small_trainer(tmp_path, callbacks=[callback], **OPTIONS)
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be saved .*: model.safetensors was not written"):
        run.train()
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [1]


TRAINER = {"trainer_state.json", "scheduler.pt", "amopo_state_0.pt", "amopo_state_1.pt", "rng_state_0.pth",
           "rng_state_1.pth"}  # fmt: skip
HELD = {
    "FSDP, sharded": {"pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"},
    "FSDP, whole": {"pytorch_model_fsdp.bin", "optimizer.bin"},
    "an adapter": {"adapter_model.safetensors", "optimizer.pt"},
    "shards": {"model.safetensors.index.json", "optimizer.pt"},
    "DeepSpeed": {"global_step3/mp_rank_00_model_states.pt"},
}


@pytest.mark.parametrize("name", HELD)
def test_what_every_engine_writes_is_complete_and_less_is_not(name):
    names = TRAINER | HELD[name]
    assert lacking(names, 2, False) == ""
    needed = names - ({"scheduler.pt"} if name == "DeepSpeed" else set())
    for left_out in needed:
        assert lacking(names - {left_out}, 2, False), left_out
    states = {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"}
    if name in ("an adapter", "shards"):
        assert lacking(names - states, 2, True) == ""
    assert lacking(names, 2, False, shards={"model-00002-of-00002.safetensors"}) == "model-00002-of-00002.safetensors"


def test_a_quick_look_reads_no_file(copy):
    zero("model.safetensors")(copy / NEWEST)
    assert problem_of(copy / NEWEST) == "" and "model.safetensors was changed" in damage_of(copy / NEWEST)

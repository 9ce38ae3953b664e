"""Two processes train a multimodal class, a hybrid and a mixture of experts as one does; sharded models are checked."""

from pathlib import Path

import pytest
import torch
from children import child_environment, run
from kinds_of_models import KINDS

SCRIPT = Path(__file__).with_name("ranks_of_kinds.py")
SCENARIOS = ["ddp-multimodal:1,2", *(f"fsdp-{kind}:1,2" for kind in KINDS), "real_logits:2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    environment = child_environment(OMP_NUM_THREADS="1")
    done = run(str(SCRIPT), str(folder), *SCENARIOS, environment=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return lambda scenario, world: torch.load(folder / f"{scenario}-{world}.pt", weights_only=True)


def ran(folder, scenario, *worlds, **variables):
    """What the processes of each number saved, of a run of its own."""
    environment = child_environment(OMP_NUM_THREADS="1", **variables)
    asked = f"{scenario}:{','.join(map(str, worlds))}"
    done = run(str(SCRIPT), str(folder), asked, environment=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"{scenario}-{world}.pt", weights_only=True) for world in worlds]


def error(expected, found):
    return float((expected - found).norm() / expected.norm().clamp(min=1e-3))


def test_a_multimodal_class_trains_its_text_on_two_ranks(results):
    """No rank waits for gradients of a tower that no text reaches."""
    alone, together = results("ddp-multimodal", 1), results("ddp-multimodal", 2)
    moved = []
    for name, weight in alone["after"].items():
        assert error(weight, together["after"][name]) < 1e-5, name
        if not torch.equal(weight, alone["before"][name]):
            moved.append(name)
    assert moved and not any("vision" in name or "projector" in name for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_have_the_gradients_of_one_process(results, kind):
    same_gradients(results(f"fsdp-{kind}", 1), results(f"fsdp-{kind}", 2), kind)


def same_gradients(alone, together, kind):
    assert error(alone["loss"], together["loss"]) < 1e-5
    assert alone["gradients"].keys() == together["gradients"].keys()
    assert len(alone["gradients"]) == alone["trained"] == together["trained"]
    floor = 1e-3 * max(gradient.norm() for gradient in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        difference = (gradient - together["gradients"][name]).norm() / gradient.norm().clamp(min=floor)
        assert difference < (1e-3 if kind == "hybrid" else 1e-5), name


def test_the_real_logits_of_sharded_weights_are_compared_on_every_rank(results):
    errors = results("real_logits", 2)["errors"]
    assert len(errors) == 2 and all("its own are 0.5 times lm_head's" in each for each in errors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_adapters_over_compiled_layers_have_the_gradients_of_one_process(kind, tmp_path):
    same_gradients(*ran(tmp_path, f"adapted-{kind}", 1, 2), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_of_sharded_weights_is_exact(kind, tmp_path):
    [found] = ran(tmp_path, f"resumed-{kind}", 2)
    assert found["found"].keys() == found["expected"].keys()
    moved = 0
    for name, expected in found["expected"].items():
        assert torch.equal(found["found"][name], expected), name
        moved += not torch.equal(found["middle"][name], expected)
    moments = [name for name in found["expected"] if " of " in name]
    assert moved > len(moments) > 20  # all that is trained moves, and its moments


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_moves_the_weights_as_one_process(kind, stage, tmp_path):
    """DeepSpeed's CPU accelerator. Optional: it is in no extra of this project."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    alone, together = ran(tmp_path, f"zero{stage}-{kind}", 1, 2, DS_ACCELERATOR="cpu")
    moved = 0
    for key, weight in alone["after"].items():
        step = weight - alone["before"][key]
        moved += bool(step.any())
        assert error(weight, together["after"][key]) < 1e-5, key
        assert (step - (together["after"][key] - together["before"][key])).norm() <= 1e-2 * step.norm() + 1e-6, key
    assert moved > 10

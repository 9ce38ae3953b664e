"""Two and four processes (gloo) against one: loss, gradients, metrics, the plan; sharded weights and checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import child_environment, run
from demo_folder import demo_folder
from engines import VOCABULARY

SCRIPT = Path(__file__).with_name("ranks.py")
ROOT = SCRIPT.parents[2]
TOLERANCE = 1e-6  # relative, float32


SCENARIOS = ["ddp:1,4", "ddp_saved:2", "ddp_goes_on:3", "ddp_ends:1", "ddp_resumed:1,4", "ddp_bad_loss:2",
             "ddp_sigterm:2", "ddp_best:2", "fsdp:1,2", "fsdp_tied:1,2", "fsdp_loaded:1,4", "fsdp_units:1,2,3",
             "fsdp_own_head:1,2", "fsdp_goes_on:2", "head_not_gathered:2"]  # fmt: skip


def run_groups(folder, scenarios, **variables):
    environment = child_environment(**{"OMP_NUM_THREADS": "1", **variables})
    done = run(str(SCRIPT), str(folder), *scenarios, environment=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return lambda scenario, world: torch.load(folder / f"{scenario}-{world}.pt", weights_only=True)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """results(scenario, world): one process imports torch once and forks all groups, which costs a third."""
    return run_groups(tmp_path_factory.mktemp("groups"), SCENARIOS)


def close(expected, found, tolerance=TOLERANCE):
    expected, found = torch.as_tensor(expected, dtype=torch.float64), torch.as_tensor(found, dtype=torch.float64)
    assert (expected - found).norm() <= tolerance * expected.norm().clamp(min=1e-3), (expected, found)


TIMED = ("tokens_per_second", "memory/", "runtime", "per_second", "flos", "seconds", "grad_norm")


def test_a_data_parallel_run_equals_the_single_process(groups):
    """Its last step has fewer pairs than ranks."""
    alone, together = groups("ddp", 1), groups("ddp", 4)
    assert together["records"] == alone["records"] and len(alone["records"]) == 8
    for name, gradient in alone["gradients"].items():
        close(gradient, together["gradients"][name])
    for name, weight in alone["weights"].items():
        close(weight, together["weights"][name])
    assert len(alone["log"]) == len(together["log"])
    compared = 0
    for line, other in zip(alone["log"], together["log"], strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if not any(word in key for word in TIMED):
                assert other[key] == pytest.approx(line[key], rel=TOLERANCE, abs=TOLERANCE), (line["step"], key)
                compared += 1
    assert compared > 200


@pytest.mark.parametrize("world", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_with_another_number(groups, world):
    alone, resumed = groups("ddp", 1), groups("ddp_resumed", world)
    for name, weight in alone["weights"].items():
        close(weight, resumed["weights"][name])
    losses = [line["loss"] for line in alone["log"] if "loss" in line]
    lines = [line for line in resumed["log"] if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8]
    for line, mean in zip(lines, (sum(losses[:4]) / 4, sum(losses[4:]) / 4), strict=True):
        assert line["loss"] == pytest.approx(mean, rel=TOLERANCE)
    # Metrics are means over pairs: four in each of three steps before the checkpoint, two in the step behind it.
    margins = [line["margin/first"] for line in alone["log"] if "loss" in line]
    mean = (4 * sum(margins[:3]) + 2 * margins[3]) / 14
    assert lines[0]["margin/first"] == pytest.approx(mean, rel=TOLERANCE)


def test_a_run_that_goes_from_two_ranks_to_three_and_to_one_ends_as_the_one_alone(groups):
    alone, ended = groups("ddp", 1), groups("ddp_ends", 1)
    assert groups("ddp_goes_on", 3)["complete"][-1] == 6
    assert ended["records"] == alone["records"][6:] and len(ended["records"]) == 2
    for name, weight in alone["weights"].items():
        close(weight, ended["weights"][name])


def test_a_bad_loss_on_one_rank_stops_all(groups):
    result = groups("ddp_bad_loss", 2)
    assert result["step"] == 2
    assert result["error"].startswith("NumbersError: step 3: the loss is not finite")


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(groups):
    assert groups("ddp_sigterm", 2) == {"stopped": True, "step": 3, "complete": [3]}


def test_all_ranks_load_the_best_model_of_a_run_that_was_stopped_and_of_one_that_was_not(groups):
    result = groups("ddp_best", 2)
    assert result["losses"][0] < result["losses"][1] and result["best"] == 2
    assert result["loaded"] == [True] * 4


def test_a_killed_rank_ends_the_other_with_the_way_back(tmp_path):
    """Without waiting for gloo's half hour: in 2 to 5 s."""
    done = run(str(SCRIPT), str(tmp_path), "ddp_killed:2", environment=child_environment(OMP_NUM_THREADS="1"),
               timeout=60)  # fmt: skip
    assert done.returncode and "ddp_killed on 2 ranks: exit codes [1, -9]" in done.stderr
    last = tmp_path / "killed" / "checkpoint-3"
    assert f"stopped after step 3. The last complete checkpoint is {last}: go on with" in done.stderr


@pytest.mark.parametrize("scenario, worlds", [("fsdp", (2,)), ("fsdp_tied", (2,))])
def test_sharded_scoring_equals_the_single_process(groups, scenario, worlds):
    """accelerate's FSDP2 grouping; three steps, since hooks that ran once may not run again."""
    alone = groups(scenario, 1)
    assert not alone["sharded"]
    for result in (groups(scenario, world) for world in worlds):
        assert result["sharded"]
        close(alone["losses"][:1], result["losses"][:1])
        for name, gradient in alone["gradients"][0].items():
            close(gradient, result["gradients"][0][name])
        close(alone["norms"], result["norms"])
        assert result["left_alone"] and result["norm_of_bad"].isnan()
        # Later steps have passed through Adam, which divides by the size of gradients that are nearly zero.
        close(alone["losses"], result["losses"], 1e-4)
        for name, weight in alone["weights"].items():
            close(weight, result["weights"][name], 1e-3)


@pytest.mark.parametrize("world", [1, 4])
def test_a_sharded_checkpoint_loads_on_another_world_size(groups, world):
    saved = groups("fsdp", 2)
    loaded = groups("fsdp_loaded", world)
    for name, weight in saved["weights"].items():
        assert torch.equal(weight, loaded["weights"][name]), name
    assert all(map(torch.equal, saved["moments"], loaded["moments"]))


@pytest.mark.parametrize("scenario, worlds", [("fsdp_units", (2, 3)), ("fsdp_own_head", (2,))])
def test_the_vocabulary_matrices_are_reduced_one_by_one(groups, scenario, worlds):
    """Each a unit of its own, whose gradients are one piece, of a vocabulary that no number of ranks divides."""
    alone = groups(scenario, 1)
    for world in worlds:
        result = groups(scenario, world)
        assert not result["in_the_root_unit"]
        padded = -(-VOCABULARY // world) * world * result["hidden"]
        norm = -(-result["hidden"] // world) * world  # shares the head's unit
        assert {padded, padded + norm} <= set(result["reduced"]) and max(result["reduced"]) < 2 * padded
        close(alone["loss"], result["loss"])
        for name, gradient in alone["gradients"].items():
            close(gradient, result["gradients"][name])


def test_a_sharded_run_goes_on_bit_by_bit_from_its_files(groups):
    """By the functions of accelerate that Trainer saves and loads with; the final file holds whole matrices."""
    result = groups("fsdp_goes_on", 2)
    assert len(result["expected"]) > 60 and all(map(torch.equal, result["expected"], result["found"]))
    assert result["final"]["lm_head.weight"].shape[0] == VOCABULARY
    for name, weight in result["weights"].items():
        assert torch.equal(weight, result["final"][name]), name


def test_a_sharded_head_is_refused_outside_of_its_forward_and_gathered_inside(groups):
    result = groups("head_not_gathered", 2)
    assert "weight is a DTensor. If FSDP shards it" in result["error"]
    assert "call this inside the wrapped forward" in result["error"]
    assert result["in_the_root_unit"] == ["embeddings"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_the_single_process(tmp_path, stage):
    """DeepSpeed's CPU accelerator. Optional: it is in no extra of this project."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    results = run_groups(tmp_path, [f"zero{stage}:1,2"], DS_ACCELERATOR="cpu")
    alone, together = results(f"zero{stage}", 1), results(f"zero{stage}", 2)
    close(alone["losses"], together["losses"])
    for name, weight in alone["weights"].items():
        close(weight, together["weights"][name])


@pytest.mark.parametrize("engine", [{"fsdp": "full_shard"}, {"deepspeed": str(ROOT / "configs/deepspeed/zero3.json")}])
def test_sharding_on_the_cpu_is_refused_because_it_would_be_ddp(tmp_path, engine):
    from amopo_fast.training.config import AMoPOConfig

    if "deepspeed" in engine:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    with pytest.raises(ValueError, match="would silently run DDP"):
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **engine)


def test_sharding_that_was_asked_for_must_be_in_effect(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    from amopo_fast.training.checks import check_engine

    class Sharded(FSDPModule, torch.nn.Linear):
        pass

    args = type("Args", (), {"fsdp": "full_shard", "deepspeed": None, "fsdp_config": {"version": 2}})()
    sharded = torch.nn.Sequential(torch.nn.Linear(2, 2))
    sharded[0].__class__ = Sharded
    check_engine(sharded, args)
    with pytest.raises(ValueError, match="FSDP2 was asked for and is not in effect"):
        check_engine(torch.nn.Linear(2, 2), args)
    check_engine(torch.nn.Linear(2, 2), type("Args", (), {**vars(type(args)), "fsdp": None}))


@pytest.mark.slow
def test_launchers_on_a_machine_without_gpus(tmp_path):
    """torchrun without use_cpu is refused; accelerate's ddp.yaml with use_cpu is one run of two processes."""
    from amopo_fast.demo.data import HELDOUT_FILE

    demo_folder(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    environment = child_environment(OMP_NUM_THREADS="1")
    train = ["-m", "amopo_fast.cli", "train", "--model_name_or_path", "model", "--train_data", "pairs.jsonl",
             "--output_dir", "run", "--pairs_per_step", "4", "--max_steps", "2"]  # fmt: skip

    def start(launcher, *options):
        command = [sys.executable, "-m", *launcher, *train, *options]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    torchrun = ["torch.distributed.run", "--nproc_per_node", "2"]
    refused = start(torchrun)
    assert refused.returncode and "2 processes were started" in refused.stderr and not (tmp_path / "run").exists()
    config = str(ROOT / "configs" / "accelerate" / "ddp.yaml")
    done = start(["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"], "--use_cpu", "true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").is_file()  # of the second process
    assert done.stdout.count("optimizer steps an epoch") == 1


def test_the_shipped_configurations_are_those_that_the_engines_know():
    """The YAML's keys by accelerate's own class; the JSON by its syntax. Running them needs GPUs."""
    import json

    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.distributed_type in ("FSDP", "MULTI_GPU")
    for stage in (2, 3):
        content = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text())
        assert content["zero_optimization"]["stage"] == stage

"""Every block of docs/integrations.md runs as it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch
from models_for_integrations import tiny_model
from trainers_of_trl import trl_trainers  # noqa: F401

from amopo_kernels.integrations.hf import model_logps

PAGE = (Path(__file__).parents[3] / "docs/integrations.md").read_text()


def blocks(section):
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def names(kind="scaled"):
    model = tiny_model(kind)
    input_ids = torch.randint(3, 512, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[:, :3] = 0
    return {"model": model, "input_ids": input_ids, "mask": mask, "attention_mask": torch.ones_like(mask),
            "labels": input_ids.masked_fill(mask == 0, -100), "torch": torch}  # fmt: skip


def test_a_hugging_face_model():
    first, second = blocks("A Hugging Face model")
    found = names()
    exec(first, found)
    by_model = found["logps"]
    assert all(x.grad is not None for x in found["model"].parameters())
    exec(second, found)
    assert found["logps"].shape == by_model.shape == (4, 8)


def test_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    first, second = blocks("TRL")
    trained = []
    trainer = SimpleNamespace(cpo_loss=None, concatenated_forward=None, train=lambda: trained.append(True))
    exec(first, {"trainer": trainer})
    assert trained and trainer.concatenated_forward is not None
    found = names() | {"model_logps": model_logps}
    exec(second, found)
    assert found["loss"].isfinite() and all(x.grad is not None for x in found["model"].parameters())


def test_shared_prefixes(trl, tmp_path):
    first, second = blocks("Shared prefixes")
    found = names()
    prompts, completions = found["input_ids"][:, :3].tolist(), found["input_ids"][:, 3:].tolist()
    expected = model_logps(found["model"], found["input_ids"], completion_mask=found["mask"], temperature=0.7)
    found |= {"prompts": prompts, "completions": completions}
    exec(first, found)
    assert all(x.grad is not None for x in found["model"].parameters())
    torch.testing.assert_close(torch.stack(found["logps"]), expected[:, 2:])
    trainer = trl("grpo", tiny_model("tied"), tmp_path)
    before, trained = trainer.model.forward, []
    trainer.train = lambda: trained.append(trainer.model.forward != before)
    exec(second, {"trainer": trainer})
    assert trained == [True]


def test_verl():
    [block] = blocks("verl")
    found = names()
    exec(block, found)
    assert found["output"].entropy.shape == (4, 9)


def on_a_rank(number, rank, folder):
    """Both blocks of the section on one of two ranks; saves what they gave."""
    from datetime import timedelta

    from torch import distributed as dist

    from amopo_kernels.integrations.verl import patch_verl

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    first, second = blocks("Tensor parallelism")
    found = names("untied") | {"device": "cpu", "model_logps": model_logps, "patch_verl": patch_verl}
    exec(first, found)
    gradients = {name: x.grad for name, x in found["model"].named_parameters()}
    assert gradients["lm_head.weight"].to_local().shape[0] == 256
    gradients["lm_head.weight"] = gradients["lm_head.weight"].full_tensor()
    # verl's forward takes the place of the model's own, which model_logps put its answer into.
    found["model"].forward = type(found["model"]).forward.__get__(found["model"])
    exec(second, found)
    results = {"logps": found["logps"], "log_probs": found["output"].log_probs, "entropy": found["output"].entropy}
    torch.save({name: x.detach() for name, x in results.items()} | {"gradients": gradients}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_tensor_parallelism(tmp_path):
    alone = names("untied")
    expected = model_logps(alone["model"], alone["input_ids"], alone["labels"])
    expected.sum().backward()
    tempered, entropy = model_logps(alone["model"], alone["input_ids"], temperature=0.7, outputs=("entropy",))
    # One rank is this process, the other forked: importing everything anew takes longer than the rest.
    other = children.start_processes(on_a_rank, (1, str(tmp_path)), join=False)
    on_a_rank(0, 0, str(tmp_path))
    assert other.join()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["logps"], expected)
        torch.testing.assert_close(found["log_probs"][:, :-1], tempered)
        torch.testing.assert_close(found["entropy"][:, :-1], entropy)
        for name, x in alone["model"].named_parameters():
            assert (found["gradients"][name] - x.grad).norm() < 1e-4 * x.grad.norm().clamp(min=1e-3), name

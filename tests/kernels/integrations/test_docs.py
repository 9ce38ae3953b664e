"""Every block of docs/integrations.md runs as it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

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


def names():
    model = tiny_model("scaled")
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

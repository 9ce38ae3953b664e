"""Multimodal classes: loaded as published, their text part trained, the rest frozen and saved as it was."""

import pytest
import torch
from packing_cases import random_pairs, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma3Config, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.loading import add_adapter, load_whole
from amopo_fast.models.miniature import tiny_config
from amopo_fast.models.scoring import score
from amopo_fast.models.text_part import auto_class, beside_text
from amopo_fast.packing.plan import build_plan


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as a multimodal checkpoint is published."""
    config = tiny_config(Gemma3Config())
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[Gemma3Config](config).save_pretrained(folder)
    return folder


def test_the_text_is_trained_and_the_rest_saved_as_it_was(published, tmp_path):
    model = load_whole(published, dtype=torch.float32)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    prepare_model(model)
    assert "vision_tower" in choice_of(model).frozen and "multi_modal_projector" in choice_of(model).frozen
    score(model, build_plan(random_pairs(0, 2))).logp_sum.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)  # DDP waits for none in vain
    torch.optim.SGD(trained, lr=1e-2).step()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Gemma3ForConditionalGeneration"]
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name or "projector" in name for name in changed)


def test_an_adapter_is_of_the_text_part_alone(published):
    from peft import LoraConfig

    model = load_whole(published, dtype=torch.float32)
    adapted = add_adapter(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    prepare_model(adapted)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and all("language_model" in name for name in names)
    score(adapted, build_plan(random_pairs(0, 1))).logp_sum.sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_a_plain_causal_lm_has_nothing_beside_its_text():
    model = prepare_model(tiny_model("llama"))
    assert beside_text(model) == [] and not choice_of(model).frozen
    assert auto_class(LlamaConfig()).__name__ == "AutoModelForCausalLM"

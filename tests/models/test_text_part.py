"""Multimodal classes: loaded as published, their text part trained, the rest frozen and saved as it was."""

import json

import pytest
import torch
from packing_cases import random_pairs, tiny_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BartConfig,
    DeepseekV32Config,
    Gemma3Config,
    GitConfig,
    LlamaConfig,
    Qwen3OmniMoeThinkerConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from amopo_fast.cli import main
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.loading import add_adapter, load_whole
from amopo_fast.models.miniature import tiny_config
from amopo_fast.models.scoring import score
from amopo_fast.models.text_part import auto_class, beside_text, linear_layers, place_of
from amopo_fast.packing.plan import build_plan
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

PROCESSOR = {
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 8, "width": 8}},
}

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as a multimodal checkpoint is published: with its processor's files."""
    config = tiny_config(Gemma3Config())
    tokenizer = demo_tokenizer()
    config.vocab_size = config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[Gemma3Config](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def is_whole(folder, published):
    """Whether a folder holds the multimodal checkpoint with another text part."""
    assert AutoConfig.from_pretrained(folder).architectures == ["Gemma3ForConditionalGeneration"]
    for name in PROCESSOR:
        assert (folder / name).read_bytes() == (published / name).read_bytes(), name
    before, after = (load_file(each / "model.safetensors") for each in (published, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name or "projector" in name for name in changed)
    assert type(load_whole(folder)).__name__ == "Gemma3ForConditionalGeneration"
    return changed


def trainer(published, folder, **options):
    config = AMoPOConfig(
        output_dir=str(folder), pairs_per_step=4, num_train_epochs=1, use_cpu=True, learning_rate=1e-2,
        disable_tqdm=True, report_to="none", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    return AMoPOTrainer(str(published), config, dimensions=["a", "b", "c"], train_dataset=random_pairs(0, 8), **options)


def test_every_folder_of_a_run_is_a_whole_multimodal_checkpoint(published, tmp_path):
    run = trainer(published, tmp_path)
    run.train()
    run.save_final()
    assert is_whole(tmp_path, published) and is_whole(tmp_path / "checkpoint-2", published)


def test_an_adapter_is_merged_into_the_whole_checkpoint(published, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    run = trainer(published, tmp_path / "run", peft_config=adapter)
    run.train()
    run.save_final()
    ids = torch.arange(1, 30)[None]
    trained = run.model.eval()(input_ids=ids).logits
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    changed = is_whole(tmp_path / "merged", published)
    assert all("language_model" in name for name in changed)
    torch.testing.assert_close(load_whole(tmp_path / "merged")(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What is this?", "images": ["cat.png"]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]},
    ],
)
def test_pairs_with_images_are_refused_by_name(tmp_path, published, record, capsys):
    sides = {side: {"response": side, "helpfulness": 3} for side in ("chosen", "rejected")}
    (tmp_path / "data.json").write_text(json.dumps([record | sides]))
    options = ["--train_data", str(tmp_path / "data.json"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true",
               "--model_name_or_path", str(published), "--dimensions", "no_object", "helpfulness"]  # fmt: skip
    assert main(["train", *options]) != 0
    error = capsys.readouterr().err
    assert "image" in error and "text" in error, error


def test_the_text_is_trained_and_the_rest_frozen(published):
    model = load_whole(published, dtype=torch.float32)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    prepare_model(model)
    assert "vision_tower" in choice_of(model).frozen and "multi_modal_projector" in choice_of(model).frozen
    score(model, build_plan(random_pairs(0, 2))).logp_sum.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)  # DDP waits for none in vain


class TestWhatNoLossOfTextLeadsTo:
    """Beside towers: cross-attention without its encoder, an indexer that chooses keys, towers in the decoder."""

    CASES = {
        "bart": (BartConfig(is_encoder_decoder=False), "model.decoder.layers.*.encoder_attn,"),
        "indexer": (DeepseekV32Config(), "model.layers.*.self_attn.indexer ("),
        "towers": (GitConfig(), "git.image_encoder, git.visual_projection ("),
    }

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_is_frozen_and_the_rest_has_gradients(self, case, adapted):
        from peft import LoraConfig

        config, frozen = self.CASES[case]
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](tiny_config(config))
        if adapted:
            model = add_adapter(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        prepare_model(model)
        assert choice_of(model).frozen.removeprefix("base_model.model.").startswith(frozen)
        score(model, build_plan(random_pairs(0, 2), choice_of(model).layout)).logp_sum.sum().backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(parameter.grad is not None for parameter in trained.values())
        adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
        assert adapters == (trained.keys() if adapted else set())  # none that is frozen for ever

    def test_places_are_those_of_every_layer_and_of_its_adapters(self):
        assert place_of("model.layers.10.mlp.experts.3.up.weight") == "model.layers.*.mlp.experts.*.up.weight"
        for adapted in ("base_layer.weight", "lora_A.default.weight"):
            assert place_of(f"layers.1.q_proj.{adapted}") == "layers.*.q_proj.weight"
        assert place_of("ln_1.conv1d.weight") == "ln_1.conv1d.weight"


def test_an_adapter_is_of_the_text_part_alone(published):
    from peft import LoraConfig

    model = load_whole(published, dtype=torch.float32)
    adapted = add_adapter(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    prepare_model(adapted)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and all("language_model" in name for name in names)
    score(adapted, build_plan(random_pairs(0, 1))).logp_sum.sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_all_linear_is_of_the_text_part_where_a_tower_has_layers_under_numbers():
    """PEFT's own list reaches from a tower's `mlp.0` to the decoder's `layers.0`."""
    from peft import LoraConfig

    with torch.device("meta"):
        config = Qwen3OmniMoeThinkerConfig()
        config.text_config = tiny_config(config.text_config)
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[Qwen3OmniMoeThinkerConfig](config)
        names = linear_layers(model, frozenset())
    adapted = add_adapter(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(names) == 8 and all("language_model" in name or "model.layers" in name for name in names), names
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names)


def test_a_plain_causal_lm_has_nothing_beside_its_text():
    model = prepare_model(tiny_model("llama"))
    assert beside_text(model) == [] and not choice_of(model).frozen
    assert auto_class(LlamaConfig()).__name__ == "AutoModelForCausalLM"

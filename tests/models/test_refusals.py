"""Why a type is refused, as docs/models.md says it: each reason is shown on the model itself."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from amopo_fast.models.architecture import UnsupportedModelError, language_model_of  # noqa: E402
from amopo_fast.models.check import choose_layout  # noqa: E402
from amopo_fast.models.miniature import miniature  # noqa: E402
from amopo_fast.models.text_part import auto_class  # noqa: E402
from model_types import KINDS, NOT_TRAINED, config_of, empty_model, type_names  # noqa: E402

T = 30
NEW = pytest.mark.skipif("gemma4_assistant" not in CONFIG_MAPPING, reason="a type of later transformers")


def empty(name):
    return empty_model("causal" if name in type_names("causal") else "image-text", name)


@pytest.mark.parametrize("name", ["blip", "blt", "cpmant", "pi0", "prophetnet", "reformer", "xlnet"])
def test_refused(name):
    with pytest.raises(UnsupportedModelError):
        choose_layout(empty(name))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits[0]


@pytest.fixture
def ids():
    return torch.randint(1, 59, (1, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small():
    def build(name):
        torch.manual_seed(0)
        return miniature(language_model_of(empty(name)))

    return build


@pytest.mark.parametrize("name", ["cpmant", "xlnet"])
def test_what_follows_changes_the_logits(name, small, ids):
    model, other = small(name), ids.clone()
    other[0, -1] = 59 - other[0, -1]
    assert (logits(model, ids) - logits(model, other))[:-1].abs().amax(-1).min() > 1e-3


def test_prophetnet_counts_what_follows(small, ids):
    model = small("prophetnet")
    assert (logits(model, ids)[:-1] - logits(model, ids[:, :-1])).abs().amax(-1).min() > 1e-2


def test_glm5_next_looks_whether_a_token_follows_its_block(small, ids):
    model = small("glm5_next")
    rows = [logits(model, ids[:, :n]) for n in range(8, T)]
    differs = [(longer[:-1] - row).abs().max() > 1e-3 for row, longer in zip(rows, rows[1:], strict=False)]
    assert any(differs) and not all(differs)


def test_reformer_sorts_hashes_of_what_follows_too(small):
    model = small("reformer")
    length = 4 * model.config.lsh_attn_chunk_length
    long = torch.randint(1, 59, (1, length), generator=torch.Generator().manual_seed(0))
    assert (logits(model, long) - logits(model, long)).abs().max() > 1e-3  # they are drawn at every call
    for module in model.modules():
        if hasattr(module, "hash_seed"):
            module.hash_seed = 1
    other = long.clone()
    other[0, -1] = 59 - other[0, -1]
    before, after = logits(model, long), logits(model, other)
    assert torch.equal(before, logits(model, long))
    assert ((before - after)[:-1].abs().amax(-1) > 1e-3).sum() > length // 8
    short = long[:, : model.config.lsh_attn_chunk_length // 2]
    assert torch.equal(logits(model, short), logits(model, short))


@pytest.mark.parametrize("name", ["musicgen", "musicgen_melody"])
def test_codes_of_audio_are_predicted_in_rows(name):
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    with torch.device("meta"):
        model = model_class(model_class.config_class(num_hidden_layers=1))
    assert len(model.lm_heads) == 4
    assert logits(model, torch.zeros(4, T, dtype=torch.long, device="meta")).shape == (T, 2048)
    with pytest.raises(RuntimeError, match="invalid for input"):
        logits(model, torch.zeros(1, T, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("blip", "pixel_values"),
        ("idefics", "pixel_values"),
        pytest.param("gemma4_assistant", "shared_kv_states cannot be None", marks=NEW),
        ("gemma4_unified_assistant", "shared_kv_states cannot be None|no attribute 'vocab_size'"),  # 5.24, 5.17
    ],
)
def test_text_alone_is_not_enough(name, message, ids):
    with pytest.raises((AttributeError, TypeError, ValueError), match=message):
        logits(empty(name), ids.to("meta"))


def test_no_head_predicts_tokens():
    assert language_model_of(empty("pi0")).get_output_embeddings() is None


def test_bytes_are_patched():
    model = empty("blt")
    assert model.config.patching_mode == "entropy" and model.model.patcher is not None
    assert hasattr(model.model, "local_encoder")


def test_a_block_is_denoised_at_once():
    config = config_of("diffusion_gemma")
    assert not AutoModelForCausalLM._model_mapping.get(type(config), None) and "canvas" in str(config)


def test_transformers_do_not_find_the_class():
    config = config_of("evolla")
    for kind in (auto_class(config), AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="Unrecognized configuration class"), torch.device("meta"):
            kind.from_config(config)


def test_every_reason_is_shown_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in source for name in NOT_TRAINED)
    assert all(name in {each for kind in KINDS for each in type_names(kind)} for name in NOT_TRAINED)

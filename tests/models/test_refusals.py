"""Why a type is refused, in the words of its error, and that each is true of the model itself."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from amopo_fast.models.architecture import (  # noqa: E402
    UnsupportedModelError,
    language_model_of,
    refusal,
    refusal_unloaded,
)
from amopo_fast.models.check import choose_layout, prepare_model  # noqa: E402
from amopo_fast.models.choice import choice_of  # noqa: E402
from amopo_fast.models.config import ModelConfig  # noqa: E402
from amopo_fast.models.loading import load_shape, model_errors  # noqa: E402
from amopo_fast.models.miniature import miniature  # noqa: E402
from amopo_fast.models.text_part import auto_class  # noqa: E402
from amopo_fast.packing.plan import Layout  # noqa: E402
from model_types import config_of, empty_model, type_names  # noqa: E402

T = 30
NOT_CAUSAL = "it is not causal: another last token moves the logits of the tokens before it"
NO_TEXT = "its own forward does not run on text alone"
REFUSED = {
    "cpmant": NOT_CAUSAL,
    "diffusion_gemma": NOT_CAUSAL,
    "reformer": NOT_CAUSAL,
    "xlnet": NOT_CAUSAL,
    "bert": NOT_CAUSAL,  # without is_decoder
    "prophetnet": "it is not causal: how many tokens follow moves the logits of those before them",
    "blip": f"{NO_TEXT} .*missing 1 required positional argument: 'pixel_values'",
    "gemma4_assistant": f"{NO_TEXT} .*shared_kv_states cannot be None",
    "gemma4_unified_assistant": f"{NO_TEXT} .*shared_kv_states cannot be None",
    "blt": "it is put together of decoder_config, encoder_config, global_config, patcher_config, none of which is its",
    "pi0": "it is put together of dit_config, vlm_config, none of which is its language model",
}
ENCODERS = ("florence2", "musicgen", "musicgen_melody", "pix2struct", "pp_formulanet", "t5gemma2", "udop",
            "vision-encoder-decoder")  # fmt: skip


def empty(name):
    if name == "bert":
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]](CONFIG_MAPPING[name](num_hidden_layers=2))
    return empty_model("causal" if name in type_names("causal") else "image-text", name)


# Defaults of 5.17 do not build, or transformers does not find the class at all; the versions between were not tried.
LATER = {"diffusion_gemma", "evolla", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}
OLD = Version(transformers.__version__) < Version("5.24")


def known(names):
    """The types that this version of transformers has."""
    return [
        pytest.param(each, marks=pytest.mark.skipif(
            each not in CONFIG_MAPPING or (OLD and each in LATER), reason="a type of later transformers"
        ))
        for each in names
    ]  # fmt: skip


@pytest.mark.parametrize("name", known(REFUSED))
def test_the_error_says_why(name):
    with pytest.raises(UnsupportedModelError, match=f"cannot be trained: {REFUSED[name]}"):
        choose_layout(empty(name))


def encoder_decoder(name):
    parts = {each: CONFIG_MAPPING[kind]().to_dict() for each, kind in (("encoder", "vit"), ("decoder", "bert"))}
    return CONFIG_MAPPING[name](**(parts if name == "vision-encoder-decoder" else {}))


@pytest.mark.parametrize("name", known(ENCODERS))
def test_encoders_with_decoders_are_refused(name):
    assert "it is an encoder-decoder model" in refusal(encoder_decoder(name))


def test_an_encoder_with_a_decoder_is_refused_before_it_is_loaded(tmp_path):
    encoder_decoder("vision-encoder-decoder").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="trained: it is an encoder-decoder model"), model_errors("some"):
        load_shape(ModelConfig(str(tmp_path)))
    assert refusal_unloaded(CONFIG_MAPPING["bart"]()) is None  # whose decoder is a class of its own


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


def test_reformer_sorts_hashes_of_what_follows_too(small):
    model = small("reformer")
    length = 16 * model.config.lsh_attn_chunk_length
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


@pytest.mark.parametrize("name", known(["evolla"]))
def test_a_type_that_transformers_does_not_find_is_loaded(name):
    """Evolla's configuration is another type's too, so the auto classes say that they do not know it."""
    config = config_of(name)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    prepare_model(model)
    assert choice_of(model).layout is Layout.SHARED
    assert "model.protein_encoder, model.layers.*.adapter (" in choice_of(model).frozen


@pytest.mark.parametrize("name", known(["glm5_next", "idefics", "minimax_m3_vl_text"]))
def test_what_separate_rows_train(name):
    """Blocks of keys that a query chooses among; layers that are told that no token sees an image."""
    choice = choose_layout(empty(name))
    assert choice.layout is Layout.SEPARATE
    if name == "minimax_m3_vl_text":
        assert "MiniMaxM3VLAttention gives its attention block_indices, which packed" in choice.reason


def test_a_package_that_is_missing_is_named():
    def load():
        raise ImportError("\nXModel requires the timm library but it was not found in your environment. You can "
                          "install it with pip: `pip install timm`. Please note that you may need to restart.")

    with pytest.raises(ValueError) as caught, model_errors("some/model"):
        load()
    assert str(caught.value) == (
        "model_name_or_path: 'some/model' cannot be loaded: XModel requires the timm library but it was not found in "
        "your environment. You can install it with pip: `pip install timm`."
    )

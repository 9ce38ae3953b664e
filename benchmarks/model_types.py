"""A configuration for every type of transformers' causal and image-text mappings: the default one, or near it.

Some types have no default that builds, or one that no published checkpoint has. ADJUSTED says what is given to them;
an encoder that can be a decoder is made one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

_MAPPINGS = {
    "causal": (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
KINDS = tuple(_MAPPINGS)

_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HALF_MROPE = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
_QSA = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
        "indexer_compress_ratio": 32}  # fmt: skip
_SPARSE_M3 = {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57}
# Of a part of the configuration, or of the whole.
PARTS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "diffusion_gemma": {"text_config": {"model_type": "diffusion_gemma_text", "num_experts": 128, "top_k_experts": 8,
                                        "moe_intermediate_size": 704}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "emu3": {"vocabulary_map": {"<image>": 8711, "<|extra_200|>": 5}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336",
                                        "model_args": {"embed_dim": 1024}}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
}  # fmt: skip
# Of the text model.
ADJUSTED: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _ENCODERS},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "cohere_compass": {"rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"head_dim": 128, "rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]}},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    # Their defaults have layers of one kind alone; what is published mixes two.
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 2) * 4},
    "minimax_m3_vl": _SPARSE_M3,
    "minimax_m3_vl_text": _SPARSE_M3,
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": _QSA,
    "qwen4_exp_text": _QSA,
    "qwen3_omni_moe_thinker": {"num_attention_heads": 32, "head_dim": 128},
    "step3p7": {"sliding_window": 512},
    **{name: {"rope_parameters": _HALF_MROPE} for name in ("glm4v", "glm46v", "glmga")},
    "glm4v_moe": {"rope_parameters": _HALF_MROPE, "head_dim": 128},
}

# Packages that transformers builds a type with, beside torch.
PACKAGES = {"fast_vlm": "timm", "gemma3n": "timm", "inkling_mm_model": "scipy", "perception_lm": "timm"}


def type_names(kind: str) -> list[str]:
    """All types of a kind, sorted."""
    return sorted(_MAPPINGS[kind][1])


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a type, adjusted.

    Raises:
        Exception: whatever transformers' configuration does, for a few types.
    """
    kind = CONFIG_MAPPING[name]
    changes = ADJUSTED.get(name, PARTS.get(name, {}))
    if name not in ADJUSTED or "text_config" not in kind.sub_configs:
        return kind(**changes)
    return kind(text_config={**kind().text_config.to_diff_dict(), **changes})


def empty_model(kind: str, name: str) -> nn.Module:
    """The class that a mapping names for a type, without memory."""
    config = config_of(name)
    model_class = _MAPPINGS[kind][0][type(config)]
    text = config.get_text_config()
    if model_class.config_class is type(text):  # some mappings name the text model's class for the whole
        config = text
    with torch.device("meta"):
        return model_class(config)

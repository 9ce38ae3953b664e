"""A model of each kind beside dense ones, small, with random weights: a hybrid, a mixture of experts, a multimodal."""

import torch
from transformers import FalconH1Config, Gemma3Config, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from amopo_fast.models.miniature import tiny_config

KINDS = ("hybrid", "moe", "multimodal")


def model_of(kind, seed=0):
    """Training mode, float32, attention far from uniform."""
    config = {"hybrid": FalconH1Config, "moe": Qwen3MoeConfig, "multimodal": Gemma3Config}[kind]()
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if kind == "multimodal" else MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mapping[type(config)](tiny_config(config))
        for p in model.parameters():
            p.data += torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.1 * torch.randn_like(p)
    return model.train()

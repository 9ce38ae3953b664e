"""A model's own architecture in miniature: the same class and configuration flags, small sizes, float32, on the CPU."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

VOCABULARY = 64
_HEAD_DIM = 16
_WINDOW = 12  # shorter than the sequences of the check, so that a window that is ignored shows

# Sizes of the miniature by the configuration's names. Flags, activation functions and scalings stay as they are.
_SIZES = {
    "vocab_size": VOCABULARY,
    "head_dim": _HEAD_DIM,
    "global_head_dim": _HEAD_DIM,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "sliding_window": _WINDOW,
    "attn_logit_softcapping": 1.0,  # low enough to show where it is ignored
}
_SIDE_SIZES = {"num_hidden_layers": 1, "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def _per_layer(config: PretrainedConfig) -> Iterator[tuple[str, list]]:
    """Lists of the configuration with one entry per layer."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers:
            yield name, list(value)


def _depth(config: PretrainedConfig) -> int:
    """The fewest leading layers among which every kind of layer occurs, and at least two."""
    depth = 2
    for _, value in _per_layer(config):
        if all(isinstance(item, (str, int, bool)) for item in value) and len(set(value)) <= 4:
            depth = max(depth, *(value.index(kind) + 1 for kind in set(value)))
    first_dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(first_dense, int) and first_dense < config.num_hidden_layers:
        depth = max(depth, first_dense + 1)
    return min(depth, config.num_hidden_layers)


def _tiny_rope(parameters: dict) -> dict:
    """longrope's factors, one per pair of channels, cut to the small head."""
    result = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            value = _tiny_rope(value)
        elif key in ("short_factor", "long_factor"):
            value = list(value)[: _HEAD_DIM // 2]
        result[key] = value
    if "long_factor" in result:
        # One factor for each pair of rotated channels; a partially rotated head has fewer.
        count = int(_HEAD_DIM * result.get("partial_rotary_factor", 1.0)) // 2
        result["short_factor"], result["long_factor"] = result["short_factor"][:count], result["long_factor"][:count]
    return result


def tiny_config(config: PretrainedConfig, depth: int | None = None) -> PretrainedConfig:
    """A copy with small sizes of the text model (and of the towers beside it); flags, layer kinds and scalings stay.

    depth: layers; default: the fewest among which every kind of layer occurs, and at least two.
    """
    tiny = copy.deepcopy(config)
    text = config.get_text_config()
    if text is not config:
        for name in config.sub_configs:
            part = getattr(tiny, name)
            if getattr(config, name) is text:
                setattr(tiny, name, tiny_config(text, depth))
            elif part is not None:
                for size, value in _SIDE_SIZES.items():
                    if hasattr(part, size):
                        setattr(part, size, value)
        return tiny
    depth = _depth(config) if depth is None else depth
    for name, values in _per_layer(config):
        setattr(tiny, name, values[:depth])
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tiny.num_attention_heads = 4
    if hasattr(tiny, "num_key_value_heads"):
        tiny.num_key_value_heads = 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    tiny.hidden_size = 4 * _HEAD_DIM
    for name, value in _SIZES.items():
        if isinstance(getattr(config, name, None), (int, float)):
            setattr(tiny, name, value)
    if getattr(config, "qk_rope_head_dim", None) and getattr(config, "head_dim", None) == config.qk_rope_head_dim:
        tiny.head_dim = tiny.qk_rope_head_dim  # multi-head latent attention: head_dim is the rotated part
    tiny.num_hidden_layers = depth
    if isinstance(getattr(config, "rope_parameters", None), dict):
        tiny.rope_parameters = _tiny_rope(config.rope_parameters)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(tiny, name, 0)
        elif isinstance(getattr(config, name, None), list):
            setattr(tiny, name, [0])
    tiny.use_cache = False
    tiny.dtype = torch.float32
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    return tiny


def miniature(model: nn.Module) -> nn.Module:
    """The miniature, deep enough to hold every class of module that the model holds."""
    text = model.config.get_text_config()
    depth = _depth(text)
    while True:
        tiny = _build(type(model), tiny_config(model.config, depth))
        missing = _own_classes(model) - _own_classes(tiny)
        if not missing:
            return tiny
        if depth == text.num_hidden_layers:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        depth = min(2 * depth, text.num_hidden_layers)


def _own_classes(model: nn.Module) -> set[str]:
    """Classes of the modules that the model's own file defines: not those of PEFT, quantisation, sharding or Liger."""
    file = sys.modules[type(model).__module__]
    names = {type(module).__name__ for module in model.modules() if type(module).__module__ == file.__name__}
    return {name for name in names if getattr(getattr(file, name, None), "__module__", None) == file.__name__}


def _check_device(model_class: type[nn.Module]) -> str:
    """The CPU, unless Liger has patched the model's file (for the whole process): its kernels need CUDA."""
    file = sys.modules[model_class.__module__]
    patched = any(str(getattr(value, "__module__", "")).startswith("liger_kernel") for value in vars(file).values())
    return "cuda" if patched else "cpu"


def _build(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    # The separate sequences' truth: flash implementations need a GPU, some versions' "sdpa" ignores a softcap.
    config._attn_implementation = "eager"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    device = _check_device(model_class)
    try:
        generators = [] if device == "cpu" else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices=generators), torch.device(device):
            # The class itself, not from_config: that would shard the miniature under DeepSpeed.
            return model_class(config).float().eval()
    finally:
        torch.set_default_dtype(previous)

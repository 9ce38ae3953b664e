"""Which models can be packed: reasons to refuse one, and a check that runs the model's own architecture in miniature.

Packing is exact if tokens of a row meet each other in the attention interface only, and there as the plan says. A model
class promises neither, so `check_packing` tries it: the same class and configuration flags with small sizes and random
weights, float32, on the CPU; a packed row against its sequences one by one, log-probs and all gradients. It takes about
a tenth of a second and nothing of the model itself is touched.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amopo_fast.attention import switch_attention
from amopo_fast.attention_backends import AttentionNeeds
from amopo_fast.plan import build_plan
from amopo_fast.prompts import PairTokens

_VOCABULARY = 64
_HEAD_DIM = 16
_WINDOW = 12  # shorter than the sequences of the check, so that a window that is ignored shows

# Sizes of the miniature by the configuration's names. Flags, activation functions and scalings stay as they are.
_SIZES = {
    "vocab_size": _VOCABULARY,
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
_RECURRENT = re.compile("linear|conv|mamba|ssm|recurrent|rwkv|delta|hybrid")
_TOLERANCE = 1e-4  # relative; float32 rounding stays under 1e-5, a wrong key or position is above 1e-2


class UnsupportedModelError(ValueError):
    """The model cannot be trained on packed rows; the message says why."""


def refusal(config: PretrainedConfig) -> str | None:
    """Why a configuration cannot be packed, as far as it says so itself."""
    text = config.get_text_config()
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return "it is an encoder-decoder model; AMoPO trains decoder-only causal language models"
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        return "it has cross attention, whose keys belong to no sequence of the row"
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    recurrent = sorted(kind for kind in kinds if _RECURRENT.search(kind))
    if recurrent:
        return (
            f"its layers of type {', '.join(recurrent)} carry a state along the row, from one sequence into the next; "
            "only softmax attention can be packed"
        )
    if getattr(text, "use_bidirectional_attention", None) or not getattr(text, "is_causal", True):
        return "its attention is not causal (a prefix attends to itself in both directions)"
    if getattr(text, "attn_temperature_tuning", False):
        return (
            "attn_temperature_tuning scales queries by their place in the row; set config.attn_temperature_tuning = "
            f"False, which changes nothing for sequences under {text.floor_scale} tokens"
        )
    if getattr(text, "alibi", False):
        return "ALiBi biases are made from places in the row, not from position_ids"
    return None


BEYOND_LIMIT = (
    "where this model's RoPE or chunked attention depends on the longest sequence of the row; shorten the sequences "
    "(max_length), or train a model without longrope, dynamic RoPE or chunked attention"
)


def position_limit(config: PretrainedConfig) -> int | None:
    """Positions up to which a packed row is exact; None: any.

    `longrope` and `dynamic` RoPE choose their frequencies by the longest sequence of the call, so beyond the original
    length one long sequence would change the short ones of its row. Chunked attention (Llama 4) is full attention up
    to its chunk size.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "attention_chunk_size", None)]
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return min((limit for limit in limits if limit), default=None)


def decoder_of(model: nn.Module) -> nn.Module:
    """The body of a causal LM, from token ids to the last hidden states."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # where the class does not say
        decoder = next(module for module in model.children() if isinstance(module, PreTrainedModel))
    return decoder


def attention_needs(model: nn.Module, device: torch.device) -> AttentionNeeds:
    """What the model's layers ask of an attention backend, by its configuration and the current autocast."""
    text = model.config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("head_dim", "global_head_dim", "v_head_dim")]
    sizes.append((getattr(text, "qk_nope_head_dim", None) or 0) + (getattr(text, "qk_rope_head_dim", None) or 0))
    kinds = getattr(text, "layer_types", None)
    first_layer = getattr(decoder_of(model), "layers", [model])[0]
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    autocast = torch.is_autocast_enabled(device.type)
    weights = model.get_input_embeddings().weight.dtype
    return AttentionNeeds(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=torch.get_autocast_dtype(device.type) if autocast else weights,
        head_dim=max((size for size in sizes if size), default=text.hidden_size // text.num_attention_heads),
        window=bool(window) and (kinds is None or any("sliding" in kind for kind in kinds)),
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        dropout=getattr(text, "attention_dropout", 0.0) > 0,
        sinks=any("sinks" in name for name, _ in first_layer.named_parameters()),
    )


def check_prompt_learning(model: nn.Module) -> None:
    """Refuse PEFT methods that put virtual tokens before the prompt: a packed row has no place for them."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT's {config.peft_type.value} adds virtual tokens, which packed rows do not carry; use LoRA"
            )


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


def _check_pairs() -> list[PairTokens]:
    """Two pairs, three dimensions: shared prompts and response prefixes, a branch inside the window, one token."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.integers(1, _VOCABULARY, count)

    pairs = []
    for record in range(2):
        head, opening = draw(9), draw(6)
        prompts = (head, np.concatenate([head, draw(11)]), np.concatenate([head[:5], draw(4)]))
        chosen, rejected = np.concatenate([opening, draw(12)]), np.concatenate([opening, draw(3)])
        pairs.append(PairTokens(record, prompts, chosen, rejected if record else opening[:1], False))
    return pairs


def _reinitialise(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform: the usual 0.02 would hide a wrong key."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() < 2 else 1.5 / parameter.shape[-1] ** 0.5
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.data = parameter.data + 0.1 * noise if parameter.dim() < 2 else scale * noise


def check_packing(model: nn.Module) -> None:
    """Refuse a causal LM that packed rows would train wrongly.

    Raises:
        UnsupportedModelError: with the reason: the configuration's own (`refusal`), a miniature that cannot be built or
            run, or log-probs or gradients of the miniature that differ between a packed row and separate sequences.
    """
    name, config = type(model).__name__, model.config
    reason = refusal(config)
    if reason:
        raise UnsupportedModelError(f"{name} cannot be packed: {reason}")
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        raise UnsupportedModelError(
            f"{name} cannot be packed: it does not use transformers' attention interface, so a packed row would mix "
            "its sequences"
        )
    try:
        tiny = _tiny_model(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be packed: its architecture could not be tried in miniature "
            f"({type(error).__name__}: {error})"
        ) from error
    device = next(tiny.parameters()).device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small only wait for each other's threads
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _reinitialise(tiny)
            _compare(tiny, name)
    finally:
        torch.set_num_threads(threads)


def _tiny_model(model: nn.Module) -> nn.Module:
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


def _compare(tiny: nn.Module, name: str) -> None:
    from amopo_fast.scoring import score  # scoring prepares models with this module

    pairs = _check_pairs()
    device = next(tiny.parameters()).device
    weights = torch.linspace(-1.0, 1.0, 5, device=device)

    def gradients(logps: torch.Tensor) -> dict[str, torch.Tensor]:
        tiny.zero_grad()
        (logps * weights[torch.arange(len(logps)) % 5]).sum().backward()
        return {key: p.grad.clone() for key, p in tiny.named_parameters() if p.grad is not None}

    try:
        separate = []
        for pair in pairs:
            for prompt in pair.prompts:
                for response in (pair.chosen, pair.rejected):
                    ids = torch.from_numpy(np.concatenate([prompt, response])).to(device)
                    logits = tiny(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                    separate.append(logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].sum())
        expected = torch.stack(separate)
        expected_gradients = gradients(expected)
        switch_attention(tiny)
        plan = build_plan(pairs, min_node_tokens=3).to(device)
        packed = score(tiny, plan, attention_backend="sdpa", backend="torch").logp_sum
        packed_gradients = gradients(packed)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be packed: its miniature does not run packed ({type(error).__name__}: {error})"
        ) from error
    error = float(((packed - expected).abs() / expected.abs()).max().detach())
    if not error < _TOLERANCE:
        raise UnsupportedModelError(
            f"{name} cannot be packed: in its miniature the log-probs of a packed row differ from those of separate "
            f"sequences by {error:.1e}; something besides attention looks along the row, or the logits are not those "
            "of lm_head"
        )
    # Some gradients are zero but for rounding (a key's bias), so a floor keeps their noise out.
    floor = 1e-3 * max(value.norm() for value in expected_gradients.values())
    for key, value in expected_gradients.items():
        other = packed_gradients.get(key, torch.zeros_like(value))
        error = float((other - value).norm() / value.norm().clamp(min=floor))
        if not error < 10 * _TOLERANCE:
            raise UnsupportedModelError(
                f"{name} cannot be packed: in its miniature the gradient of {key} differs between a packed row and "
                f"separate sequences by {error:.1e}"
            )

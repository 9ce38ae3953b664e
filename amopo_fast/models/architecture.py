"""What a model's configuration and modules say about it: why it cannot be trained, its limits, its decoder."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amopo_fast.models.attention_backends import AttentionNeeds


class UnsupportedModelError(ValueError):
    """The model cannot be trained on packed rows; the message says why."""


def refusal(config: PretrainedConfig) -> str | None:
    """Why a configuration cannot be trained, as far as it says so itself."""
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        return "it is an encoder-decoder model; AMoPO trains decoder-only causal language models"
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        return f"it is put together of {', '.join(sorted(config.sub_configs))}, none of which is its language model"
    return None


def refusal_unloaded(config: PretrainedConfig) -> str | None:
    """Why nothing of a checkpoint need be loaded: its encoder and decoder have no classes of their own, as BART's have.
    """
    return refusal(config) if config.is_encoder_decoder and config.sub_configs else None


BEYOND_LIMIT = (
    "where this model's RoPE, chunked attention or choice of keys depends on the longest sequence of the row; shorten "
    "the sequences (max_length), train a model without longrope, dynamic RoPE, chunked attention or keep_window_size, "
    "or, with chunked attention, with --layout separate"
)


def noise_of_routers(config: PretrainedConfig) -> str:
    """What the routers of a mixture of experts draw at random in training, in words; "" for nothing."""
    text = config.get_text_config()
    fields = ((name, value) for name, value in vars(text).items() if name.endswith("jitter_noise") and value)
    return ", ".join(f"{name} {value:g}" for name, value in fields)


def position_limit(config: PretrainedConfig, shared: bool = True) -> int | None:
    """Positions up to which a plan is exact; None: any. shared: in one row, not each sequence in its own.

    `longrope` and `dynamic` RoPE choose their frequencies by the longest sequence of the call, so beyond the original
    length one long sequence would change the short ones of its row. Chunked attention (Llama 4) is full attention up
    to its chunk size. Doge keeps `keep_window_size` keys, and which ones of equal tokens depends on the row's length.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "attention_chunk_size", None) if shared else None, getattr(text, "keep_window_size", None)]
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return min((limit for limit in limits if limit), default=None)


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the embedding: token ids from there on have none."""
    weight = causal_lm(model).get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # DeepSpeed ZeRO-3 leaves an empty tensor


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence that a model says it takes; None where it says none."""
    text = causal_lm(model).config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or None


def decoder_of(model: nn.Module) -> nn.Module:
    """The body of a causal LM, from token ids to the last hidden states."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # where the class does not say
        decoder = next(module for module in model.children() if isinstance(module, PreTrainedModel))
    return decoder


# Widths of a query, key or value, and probabilities of dropping an attention weight, as configurations call them.
_HEAD_DIMS = ("head_dim", "qk_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels",
              "attention_head_dim")  # fmt: skip
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_WINDOWS = ("sliding_window", "sliding_window_size")


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The text configuration of every layer: one where they do not differ."""
    text = config.get_text_config()
    return list(text.per_layer_config) if text.is_heterogeneous else [text]


def attention_needs(model: nn.Module, device: torch.device) -> AttentionNeeds:
    """What the model's layers, all of them, ask of an attention backend, by configuration and the current autocast."""
    layers = layer_configs(model.config)

    def values(names: tuple[str, ...]) -> list[float]:
        return [value for layer in layers for name in names if (value := getattr(layer, name, None))]

    sizes = [int(value) for value in values(_HEAD_DIMS)]
    for layer in layers:
        sizes.append((getattr(layer, "qk_nope_head_dim", None) or 0) + (getattr(layer, "qk_rope_head_dim", None) or 0))
        if not getattr(layer, "head_dim", None) and getattr(layer, "num_attention_heads", None):
            sizes.append(layer.hidden_size // layer.num_attention_heads)
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) and (kinds is None or any("sliding" in kind for kind in kinds))
    autocast = torch.is_autocast_enabled(device.type)
    weights = model.get_input_embeddings().weight.dtype
    return AttentionNeeds(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=torch.get_autocast_dtype(device.type) if autocast else weights,
        head_dim=max(sizes),
        window=bool(slides and values(_WINDOWS)),
        softcap=bool(values(("attn_logit_softcapping",))),
        dropout=any(value > 0 for value in values(_DROPOUTS)),
        sinks=any("sink" in name for name, _ in decoder_of(model).named_parameters()),
    )


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_model_of(model: nn.Module) -> nn.Module:
    """What reads and predicts text: the causal LM itself, or the whole one inside a multimodal class."""
    outer = causal_lm(model)
    inner = (child for child in outer.children() if isinstance(child, PreTrainedModel))
    return next((child for child in inner if type(child).__name__.endswith("ForCausalLM")), outer)

"""What a model's configuration and modules say about it: why it cannot be packed, its limits, its decoder and head."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from amopo_fast.models.attention_backends import AttentionNeeds

_RECURRENT = re.compile("linear|conv|mamba|ssm|recurrent|rwkv|delta|hybrid")


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


@dataclass(frozen=True)
class Head:
    """What turns the body's hidden states into logits: temperature and softcap as amopo_kernels takes them."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    softcap: float | None
    temperature: float


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """The output head of a causal LM.

    Raises:
        ValueError: the head is not a plain linear layer (LoRA on lm_head, quantised heads) or the model has none.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; AMoPO trains causal language models")
    # FSDP2 replaces a module's class by a subclass of FSDPModule and it.
    own_class = next(kind for kind in type(head).__mro__ if not issubclass(kind, FSDPModule))
    if own_class is not nn.Linear:
        raise ValueError(
            f"lm_head is a {type(head).__name__}, not nn.Linear: adapters and quantisation on lm_head are not "
            "supported; leave lm_head out of target_modules (and in llm_int8_skip_modules), or merge it first"
        )
    config = causal_lm(model).config.get_text_config()
    temperature = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        temperature *= config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        temperature /= config.logit_scale
    return Head(head.weight, head.bias, getattr(config, "final_logit_softcapping", None), temperature)


def set_layers(config: PretrainedConfig, layers: int) -> None:
    """Give a configuration another depth, in place: the number and the list of one type per layer agree."""
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]

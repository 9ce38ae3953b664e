"""The text part of a multimodal class: which class holds it, and what lies beside it and is not trained."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_files

from amopo_fast.models.architecture import causal_lm, decoder_of, language_model_of

# What a multimodal checkpoint holds beside weights, configuration and tokenizer.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

# Types whose out_proj PEFT refuses (0.18 to 0.21, tuners_utils.py): Mamba's kernels take its weight past an adapter.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What builds the class that a checkpoint was published as: AutoModelForCausalLM would leave the towers of some
    multimodal ones out, and knows others not at all."""
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if multimodal is not None and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        # transformers' own search, which takes EvollaConfig for another type's, does not find it.
        AutoModelForImageTextToText.register(type(config), multimodal, exist_ok=True)
    published = getattr(multimodal, "__name__", "") in (config.architectures or ())
    only = multimodal is not None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if published or only else AutoModelForCausalLM


def beside_text(model: nn.Module) -> list[str]:
    """Names of the outermost modules that a text never reaches: towers and projectors. [] of a plain causal LM."""
    outer, inner = causal_lm(model), language_model_of(model)
    if outer is inner and outer.config.get_text_config() is outer.config:
        return []
    parts = [inner] if inner is not outer else [decoder_of(inner), inner.get_output_embeddings()]
    inside = {id(module) for part in parts if part is not None for module in part.modules()}
    around = {id(module) for module in outer.modules() if any(id(child) in inside for child in module.modules())}
    return [
        name
        for name, module in outer.named_modules()
        if id(module) not in around and id(outer.get_submodule(name.rpartition(".")[0])) in around - inside
    ]


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_OF_ADAPTERS = re.compile(r"\.(base_layer|lora_[A-Za-z_]+\.default)(?=\.|$)")


def place_of(parameter: str) -> str:
    """A parameter's name, the same for every layer and for an adapter of it: `layers.*.mlp.up_proj.weight`."""
    return _NUMBER.sub("*", _OF_ADAPTERS.sub("", parameter))


def freeze_beside_text(model: nn.Module, unreached: frozenset[str] = frozenset()) -> str:
    """Freeze what no loss of text leads to, an adapter's part of it too; what it is, in words, "" for nothing.

    unreached: places of parameters without a gradient in the trial (towers that lie in the decoder, cross-attention
        without its encoder, indexers that choose keys), beside what `beside_text` finds.
    """
    outer, inner = causal_lm(model), language_model_of(model)
    frozen = {p for name in beside_text(model) for p in outer.get_submodule(name).parameters()}
    frozen |= {p for name, p in inner.named_parameters() if place_of(name) in unreached}
    for parameter in frozen:
        parameter.requires_grad_(False)
    count = sum(parameter.numel() for parameter in frozen)
    return f"{', '.join(_outermost(outer, frozen))} ({count:,} parameters)" if count else ""


def _outermost(module: nn.Module, parameters: set[nn.Parameter], name: str = "") -> list[str]:
    """Places of the outermost modules, and of single parameters, that hold `parameters` and no others."""
    inside = set(module.parameters())
    if not inside & parameters:
        return []
    if inside <= parameters:
        return [place_of(name)]
    places = [f"{name}.{key}".lstrip(".") for key, each in module.named_parameters(recurse=False) if each in parameters]
    for key, child in module.named_children():
        places += _outermost(child, parameters, f"{name}.{key}".lstrip("."))
    return list(dict.fromkeys(map(place_of, places)))


def name_whole_layers(model: nn.Module) -> None:
    """Let a model's `_no_split_modules` name classes that it has: FSDP wraps each of them, and dies of one that is
    not there, as some multimodal classes list one of their towers' other halves."""
    outer = causal_lm(model)
    there = {type(module).__name__ for module in outer.modules()}
    outer._no_split_modules = type(outer._no_split_modules or [])(
        name for name in outer._no_split_modules or () if name in there
    )


def linear_layers(model: nn.Module, unreached: frozenset[str]) -> list[str]:
    """Names of what "all-linear" stands for: every linear layer that a loss of text leads to, but the head and those
    that PEFT refuses. PEFT's own list holds the towers' layers too, and those of lists of modules under names like `0`.

    unreached: `Choice.unreached`, of towers that lie in the decoder.
    """
    outer, inner = causal_lm(model), language_model_of(model)
    beside = {module for name in beside_text(model) for module in outer.get_submodule(name).modules()}
    beside |= {module for name, module in inner.named_modules() if place_of(f"{name}.weight") in unreached}
    beside.add(inner.get_output_embeddings())
    refused = "out_proj" if outer.config.model_type in _MAMBA else None
    return [
        name
        for name, module in outer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in beside and name.rpartition(".")[2] != refused
    ]


def processor_files(name: str | Path, config: PretrainedConfig) -> list[Path]:
    """The files of the processor of a multimodal checkpoint (folder or Hub name); [] of a text model or where there are
    none. Its chat template is not among them: a processor reads the tokenizer's."""
    if not str(name) or config.get_text_config() is config:
        return []
    found = cached_files(
        name,
        list(PROCESSOR_FILES),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return [Path(path) for path in found or ()]


def copy_processor(files: list[Path], folder: str | Path) -> None:
    """Copy a processor's files into a saved model's folder, so that it is whole."""
    for path in files:
        shutil.copyfile(path, Path(folder) / path.name)

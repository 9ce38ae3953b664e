"""The text part of a multimodal class: which class holds it, and what lies beside it and is not trained."""

from __future__ import annotations

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
    published = getattr(multimodal, "__name__", "") in (config.architectures or ())
    only = multimodal is not None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if published or only else AutoModelForCausalLM


def beside_text(model: nn.Module) -> list[str]:
    """Names of the outermost modules that a text never reaches: towers and projectors. [] of a plain causal LM."""
    outer, inner = causal_lm(model), language_model_of(model)
    if outer is inner and outer.config.get_text_config() is outer.config:
        return []
    parts = [inner] if inner is not outer else [decoder_of(inner), inner.get_output_embeddings()]
    inside = {id(module) for part in parts for module in part.modules()}
    around = {id(module) for module in outer.modules() if any(id(child) in inside for child in module.modules())}
    return [
        name
        for name, module in outer.named_modules()
        if id(module) not in around and id(outer.get_submodule(name.rpartition(".")[0])) in around - inside
    ]


def freeze_beside_text(model: nn.Module) -> str:
    """Freeze what a text never reaches, an adapter's part of it too; what it is, in words, "" for nothing."""
    outer = causal_lm(model)
    names = beside_text(model)
    parameters = [parameter for name in names for parameter in outer.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    count = sum(parameter.numel() for parameter in parameters)
    return f"{', '.join(names)} ({count:,} parameters)" if count else ""


def name_whole_layers(model: nn.Module) -> None:
    """Let a model's `_no_split_modules` name classes that it has: FSDP wraps each of them, and dies of one that is
    not there, as some multimodal classes list one of their towers' other halves."""
    outer = causal_lm(model)
    there = {type(module).__name__ for module in outer.modules()}
    outer._no_split_modules = type(outer._no_split_modules or [])(
        name for name in outer._no_split_modules or () if name in there
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Names of what "all-linear" stands for: every linear layer of the text part but the head and those that PEFT
    refuses. PEFT's own list holds the towers' layers too, and those of lists of modules under names like `0`."""
    outer = causal_lm(model)
    beside = {module for name in beside_text(model) for module in outer.get_submodule(name).modules()}
    beside.add(language_model_of(model).get_output_embeddings())
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

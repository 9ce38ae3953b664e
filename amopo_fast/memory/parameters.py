"""A model's parameters, counted from its configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from amopo_fast.memory.profile import meta_model
from amopo_fast.models.architecture import decoder_of, language_model_of, positions_of
from amopo_fast.models.check import choose_layout
from amopo_fast.models.choice import Choice
from amopo_fast.optim.host_states import blocks_of


@dataclass(frozen=True)
class Parameter:
    numel: int
    trained: bool
    place: str  # layer, head (embedding too where tied), embedding, other
    linear: bool  # would be quantised
    block: int | None  # of the parameters whose states travel together, where it is trained


class Shape:
    """A configuration that can be a cache's key."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._text = config.to_json_string(use_diff=False)

    def __eq__(self, other) -> bool:
        return isinstance(other, Shape) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True)
class Tried:
    """name: of the model's class. choice: what its trial found. positions: of its longest sequence; None: no end."""

    name: str
    choice: Choice
    positions: int | None


@functools.lru_cache(maxsize=8)
def _tried(shape: Shape, requested: str) -> Tried:
    model = meta_model(shape.config)
    return Tried(type(model).__name__, choose_layout(model, requested), positions_of(model))


def tried(config: PretrainedConfig, requested: str = "auto") -> Tried:
    """What the trial of a model finds (`check.choose_layout`, and its errors); of one configuration it is made once."""
    return _tried(Shape(config), requested)


@functools.lru_cache(maxsize=8)
def _parameters_of(shape: Shape, lora_rank: int | None) -> tuple[Parameter, ...]:
    model = meta_model(shape.config, torch.bfloat16, lora_rank, tried(shape.config).choice.unreached)
    base = language_model_of(model)
    in_text = {id(parameter) for parameter in decoder_of(base).parameters()}
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head}
    block_of = {id(parameter): number for number, block in enumerate(blocks_of(model)) for parameter in block}
    result = []
    for name, parameter in model.named_parameters():
        place = "other"
        if parameter is head:
            place = "head"
        elif parameter is embedding:
            place = "embedding"
        elif id(parameter) in in_text and any(part in name for part in (".layers.", ".h.")):
            place = "layer"
        result.append(Parameter(parameter.numel(), parameter.requires_grad, place, id(parameter) in linear,
                                block_of.get(id(parameter))))  # fmt: skip
    return tuple(result)


def parameters_of(config: PretrainedConfig, lora_rank: int | None = None) -> tuple[Parameter, ...]:
    """Every parameter once, tied ones too, with an adapter's; trained are those that a run's trial does not freeze.

    Raises:
        UnsupportedModelError: no layout trains the model exactly.
    """
    return _parameters_of(Shape(config), lora_rank)

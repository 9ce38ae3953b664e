"""A configuration's layers: which kinds there are, in which order, and the same model with another number of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

_KINDS = 4  # different entries of a list per layer, at most, that are kinds of layers


def own_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration's fields, without those that differ by layer."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def set_field(config: PretrainedConfig, name: str, value: Any) -> None:
    """Set a field, unless it is computed from others."""
    attribute = getattr(type(config), name, None)
    if not isinstance(attribute, property) or attribute.fset is not None:
        with contextlib.suppress(NotImplementedError):  # a setter that says to set the fields it stands for
            setattr(config, name, value)


# Names under which a configuration counts the layers of its decoder, the first that it has; others follow from it.
_COUNTS = ("num_layers_per_stack", "decoder_layers", "num_decoder_layers", "num_hidden_layers")


def depth_of(config: PretrainedConfig) -> int:
    """Layers that a causal LM of this text configuration has: of an encoder-decoder's the decoder's (BART calls its
    encoder's num_hidden_layers), of one that runs a stack in cycles (HRM) the stack's."""
    counts = (getattr(config, name, None) for name in _COUNTS)
    return next(count for count in counts if isinstance(count, int))


def set_depth(config: PretrainedConfig, layers: int, before: int) -> None:
    """Set a text configuration's number of layers, which was `before`, under each name that it has there."""
    set_field(config, "num_hidden_layers", layers)
    if getattr(config, "num_blocks", None) == before:  # xLSTM names its depth twice and counts by this one
        set_field(config, "num_blocks", layers)


def lists_per_layer(config: PretrainedConfig, layers: int | None = None) -> Iterator[tuple[str, list]]:
    """Lists of the text configuration with one entry per layer; layers: how many entries, default its depth."""
    layers = depth_of(config) if layers is None else layers
    for name, value in own_fields(config).items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            yield name, list(value)


def overrides_of(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Fields of single layers, of a text configuration whose layers differ."""
    return {int(layer): own for layer, own in (config.to_dict().get("per_layer_config") or {}).items()}


def kinds_of_layers(config: PretrainedConfig) -> list[tuple]:
    """What is told of every layer of a text configuration: layers of one kind have equal entries."""
    depth = depth_of(config)
    overrides = overrides_of(config)
    columns: list[list] = [[str(overrides.get(layer)) for layer in range(depth)]]
    for _, values in lists_per_layer(config):
        if all(isinstance(item, (str, int, bool)) for item in values) and len(set(values)) <= _KINDS:
            columns.append(values)
    dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(dense, int):
        columns.append([layer < dense for layer in range(depth)])
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    columns.append([layer >= depth - shared for layer in range(depth)])
    return list(zip(*columns, strict=True))


def period_of(config: PretrainedConfig) -> tuple[int, int]:
    """(first layers, period): behind the first ones the kinds of layers repeat, and their sum is least."""
    kinds = kinds_of_layers(config)
    depth = len(kinds)
    found = [(depth, 0)]
    for period in range(1, depth):
        first = 0
        for layer in range(depth - period):
            if kinds[layer] != kinds[layer + period]:
                first = layer + 1
        found.append((first, period))
    return min(found, key=lambda each: (each[0] + 2 * each[1], each[1]))


def set_layers(config: PretrainedConfig, layers: int, before: int | None = None) -> None:
    """Give a configuration another depth, in place: what it says of every layer is cut or repeated.

    before: the depth that its lists have, if its number of layers has been changed already.
    """
    text = config.get_text_config()
    before = depth_of(text) if before is None else before
    cycles = text.num_hidden_layers // before if hasattr(text, _COUNTS[0]) else 1
    lists, overrides = dict(lists_per_layer(text, before)), overrides_of(text)
    if overrides:
        text.per_layer_config = None
    if getattr(text, "num_kv_shared_layers", None):  # the last layers take keys and values of the ones before
        text.num_kv_shared_layers = min(text.num_kv_shared_layers, layers // 2)
    for name, values in lists.items():
        set_field(text, name, (values * -(-layers // before))[:layers])
    for name in _COUNTS[:-1]:
        if isinstance(getattr(text, name, None), int):
            set_field(text, name, layers)
    set_depth(text, layers * cycles, before)
    if overrides:
        text.per_layer_config = {
            layer: overrides[layer % before] for layer in range(layers) if layer % before in overrides
        }

"""A model's own architecture in miniature: the same class and configuration flags, small sizes, on the CPU.

Only its text part gets weights: the towers beside it are built and never run.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from amopo_fast.models.architecture import decoder_of
from amopo_fast.models.depth import kinds_of_layers, lists_per_layer, overrides_of, own_fields, set_depth, set_field
from amopo_fast.models.small_sizes import (
    BOUNDS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    SIDE_SIZES,
    SIZES,
    TIMM_TOWER,
    TOKENS,
    VOCABULARY,
    WITHOUT_CHANCE,
)

__all__ = ["TOKENS", "miniature", "tiny_config"]

_MOST_LAYERS = 16  # of a miniature that does not build, or lacks a class, with fewer


def _depth(config: PretrainedConfig) -> int:
    """The fewest leading layers among which every kind of layer occurs, and at least two."""
    depth = 2
    overrides = overrides_of(config)
    differing = [layer in overrides for layer in range(config.num_hidden_layers)]
    for value in (*(value for _, value in lists_per_layer(config)), differing):
        if all(isinstance(item, (str, int, bool)) for item in value) and len(set(value)) <= 4:
            depth = max(depth, *(value.index(kind) + 1 for kind in set(value)))
    first_dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(first_dense, int) and first_dense < config.num_hidden_layers:
        depth = max(depth, first_dense + 1)
    return min(depth, config.num_hidden_layers)


def _tiny_rope(parameters: dict, head_dim: int) -> dict:
    """Lists with one entry per pair of rotated channels, and sections of them, cut to the small head."""
    result = {}
    pairs = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    for key, value in parameters.items():
        if isinstance(value, dict):
            value = _tiny_rope(value, head_dim)
        elif key in ("short_factor", "long_factor"):
            value = list(value)[:pairs]
        elif key == "mrope_section":
            value = _sections(len(value), pairs)
        result[key] = value
    return result


def _sections(count: int, pairs: int) -> list[int]:
    """Pairs of rotated channels, divided among kinds of positions."""
    return [pairs // count] * (count - 1) + [pairs - pairs // count * (count - 1)]


def _scaled(small: int, value: int, whole: int) -> int:
    """A layer's own size beside the small one of the other layers: as much larger or smaller as it is in the model."""
    return max(1, round(small * value / whole)) if whole else small


def tiny_config(config: PretrainedConfig, layers: Sequence[int] | None = None) -> PretrainedConfig:
    """A copy with small sizes of the text model (and of the towers beside it); flags, layer kinds and scalings stay.

    layers: places of those that stay; default: the fewest leading ones among which every kind of layer occurs, and at
    least two.
    """
    text = config.get_text_config()
    tiny = copy.deepcopy(config)
    if text is not config:
        for name in config.sub_configs:
            part = getattr(tiny, name)
            if getattr(config, name) is text:
                setattr(tiny, name, tiny_config(text, layers))
            elif part is not None:
                for size, value in SIDE_SIZES.items():
                    if isinstance(getattr(part, size, None), int):
                        setattr(part, size, value)
                if part.model_type == "timm_wrapper":
                    vars(part).update(copy.deepcopy(TIMM_TOWER))
        for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
            _set_token(tiny, config, name)
        return tiny
    layers = range(_depth(config)) if layers is None else layers
    if getattr(config, "num_kv_shared_layers", 0):  # the last layers take keys and values of the ones before
        kinds = kinds_of_layers(config)
        layers = sorted({kinds[layer]: layer for layer in layers}.values())
        tiny.num_kv_shared_layers = len(layers)
        layers *= 2
    depth = len(layers)
    lists = dict(lists_per_layer(config))
    overrides = overrides_of(config)
    if overrides:
        tiny.per_layer_config = None
        config = copy.deepcopy(config)
        config.per_layer_config = None
    for name, values in lists.items():
        sizes = SIZES.get(name) and max(values)
        kept = [values[layer] for layer in layers]
        setattr(tiny, name, [_scaled(int(SIZES[name]), value, sizes) for value in kept] if sizes else kept)
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    small: dict[str, Any] = {"num_attention_heads": HEADS, "hidden_size": HIDDEN, **SIZES}
    small["num_key_value_heads"] = HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2
    for name, value in small.items():
        if isinstance(getattr(config, name, None), (int, float)) and not isinstance(getattr(config, name), bool):
            set_field(tiny, name, value)
    if getattr(config, "index_topk_blocks", None):  # MiniMax-M3's heads of keys each have one that chooses their blocks
        tiny.index_n_heads = tiny.num_key_value_heads
    for name in ("attention_hidden_size", "lru_width"):
        if isinstance(getattr(config, name, None), int):
            set_field(tiny, name, _scaled(HIDDEN, getattr(config, name), config.hidden_size))
    if getattr(config, "qk_rope_head_dim", None) and isinstance(vars(config).get("head_dim"), int):
        # Multi-head latent attention: head_dim is the rotated part, or the whole of which a part is rotated.
        tiny.head_dim = _scaled(tiny.qk_rope_head_dim, config.head_dim, config.qk_rope_head_dim)
    if isinstance(getattr(config, "compress_rates", None), dict):  # DeepSeek-V4's, by kind of layer
        rates = config.compress_rates.items()
        tiny.compress_rates = {kind: min(rate, SIZES["index_block_size"]) for kind, rate in rates}
    for name in config.sub_configs:  # of its attention or its experts alone
        part = getattr(tiny, name, None)
        for size in small.keys() & own_fields(part).keys() if part is not None else ():
            if type(getattr(part, size)) is int:
                setattr(part, size, small[size])
        if hasattr(part, "num_hidden_layers"):  # of a tower inside the text model
            part.num_hidden_layers = 1
    set_depth(tiny, depth, config.num_hidden_layers)
    for name in BOUNDS:
        if isinstance(getattr(config, name, None), int):
            setattr(tiny, name, sum(layer < getattr(config, name) for layer in layers))
    if isinstance(getattr(config, "rope_parameters", None), dict):
        rotated = getattr(tiny, "head_dim", None) or getattr(tiny, "qk_rope_head_dim", None) or HEAD_DIM
        parameters = dict(config.rope_parameters)
        if "rope_type" in parameters and "mrope_section" in config.ignore_keys_at_rope_validation:
            parameters.setdefault("mrope_section", [0] * 3)  # ERNIE's default has the full size
        tiny.rope_parameters = _tiny_rope(parameters, rotated)
    for name in own_fields(config):
        if any(word in name for word in WITHOUT_CHANCE) and isinstance(getattr(config, name), float):
            set_field(tiny, name, 0.0)
        _set_token(tiny, config, name) if name.endswith("_token_id") else None
    if overrides:
        tiny.per_layer_config = {
            place: {
                name: _scaled(getattr(tiny, name), value, getattr(config, name)) if type(value) is int else value
                for name, value in overrides[layer].items()
            }
            for place, layer in enumerate(layers)
            if layer in overrides
        }
    tiny.use_cache = False
    tiny.dtype = None
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    return tiny


def _set_token(tiny: PretrainedConfig, config: PretrainedConfig, name: str) -> None:
    value = vars(config).get(name)
    if isinstance(value, int):
        setattr(tiny, name, VOCABULARY if name == "vocab_size" else 0)
    elif isinstance(value, list):
        setattr(tiny, name, [0])


def miniature(model: nn.Module) -> nn.Module:
    """The miniature, of as few layers as hold every class of module that the model's text part holds.

    Its weights have the default dtype and every Dropout is off; towers are not initialised.
    """
    decoder = decoder_of(model)
    wanted = _own_classes(decoder)
    for layers in _attempts(decoder, model.config.get_text_config()):
        try:
            tiny = _build(_unpatched(type(model)), tiny_config(model.config, layers))
        except Exception as error:
            reason = error
            continue
        missing = wanted - _own_classes(decoder_of(tiny))
        if not missing:
            _initialise_when_called(tiny)
            return tiny.train()
        reason = ValueError(f"it lacks {', '.join(sorted(missing))}")
    raise reason


def _attempts(decoder: nn.Module, text: PretrainedConfig) -> Iterator[Sequence[int]]:
    """Places of layers that a miniature may keep: what the configuration's lists ask for, one or two layers of each
    make, more and more leading ones."""
    depth = _depth(text)
    yield range(depth)
    stacks = (each for each in decoder.children() if isinstance(each, nn.ModuleList))
    layers = next((each for each in stacks if len(each) == text.num_hidden_layers), ())
    makes = [frozenset(type(module) for module in layer.modules()) for layer in layers]
    for count in (1, 2):  # Zamba ties a layer to the one before it of its make
        places = [place for place, make in enumerate(makes) if makes[:place].count(make) < count]
        if 1 < len(places) <= _MOST_LAYERS:
            yield places
    while depth < min(text.num_hidden_layers, _MOST_LAYERS):
        depth = min(depth + max(1, depth // 4), text.num_hidden_layers)
        yield range(depth)


def _own_classes(model: nn.Module) -> set[str]:
    """Classes of the modules that the model's own file defines: not those of PEFT, quantisation, sharding or Liger."""
    file = sys.modules[type(model).__module__]
    names = {type(module).__name__ for module in model.modules() if type(module).__module__ == file.__name__}
    return {name for name in names if getattr(getattr(file, name, None), "__module__", None) == file.__name__}


def _unpatched(model_class: type[nn.Module]) -> type[nn.Module]:
    """The class as its file says: Liger puts Triton functions into that module, for the whole process."""
    module = sys.modules[model_class.__module__]
    if not any(str(getattr(value, "__module__", "")).startswith("liger_kernel") for value in vars(module).values()):
        return model_class
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return getattr(again, model_class.__name__)


def _build(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    # The separate sequences' truth: flash implementations need a GPU, some versions' "sdpa" ignores a softcap.
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("cpu"), no_init_weights():
        # The class itself, not from_config: that would shard the miniature under DeepSpeed.
        tiny = model_class(config)
    tiny.tie_weights()
    for module in tiny.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "mrope_section") and hasattr(module, "inv_freq"):  # a default where the config has none
            module.mrope_section = _sections(len(module.mrope_section), len(module.inv_freq))
    return tiny


def _initialise_when_called(model: nn.Module) -> None:
    """Give the text part its weights, and other modules at their first call, so that a tower that is never run costs
    nothing."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for module in model.modules():  # parents first: the innermost model knows how to initialise a module
        if isinstance(module, PreTrainedModel):
            owners.update(dict.fromkeys(module.modules(), module))
    done: set[nn.Module | nn.Parameter] = set()

    @torch.no_grad()
    def initialise(module: nn.Module, inputs: tuple) -> None:
        # Some modules read the weights of their children and do not call them.
        read = (each for each in module.children() if not any(each.children()) or [*each.parameters(recurse=False)])
        for each in (module, *read):
            own = set(each.parameters(recurse=False))
            if each not in done:
                tied = {parameter: parameter.clone() for parameter in own & done}  # to what has its weights already
                owners[each]._init_weights(each)
                for parameter, value in tied.items():
                    parameter.copy_(value)
                for parameter in own - done:
                    parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100))  # _init_weights forgets some
                    _reinitialise(parameter)
            done.update(own, [each])
        hooks.pop(module).remove()

    hooks = {module: module.register_forward_pre_hook(initialise) for module in model.modules()}
    decoder = decoder_of(model)
    towers = [module for module in decoder.modules() if isinstance(module, PreTrainedModel) and module is not decoder]
    beside = {module for tower in towers for module in tower.modules()}
    for module in decoder.modules():  # all of the text part: other methods than forward read weights too
        if module not in beside:
            initialise(module, ())


def _reinitialise(parameter: torch.Tensor) -> None:
    """Weights large enough that attention is far from uniform: the usual 0.02 would hide a wrong key."""
    noise = torch.randn_like(parameter)
    parameter.copy_(parameter + 0.1 * noise if parameter.dim() < 2 else 1.5 / parameter.shape[-1] ** 0.5 * noise)

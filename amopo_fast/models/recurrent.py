"""Recurrent layers (Gated DeltaNet, Mamba2, short convolutions) over a packed row, from node to node of its trie.

A recurrent module of transformers takes its state from the cache that it is handed and leaves the next one there. Over
a packed row every node begins with a cache that holds its parent's state, in the batches of `packing.states`. Nothing
outlives the module's call, so gradients flow through the states and checkpointing recomputes them.

    hidden (1, T, H) -> batches (n, L, H), parents first, each with its parents' states -> (1, T, H)

Which modules are recurrent is seen from what they do with a cache, not from a list of names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache

from amopo_fast.models.attention import KEYWORD, PackedRow, row_is_active
from amopo_fast.models.whole_rows import over_whole_row, takes_whole_rows
from amopo_fast.packing.states import NodeStates

_CACHE = ("cache", "cache_params", "past_key_values")  # what transformers calls the cache's parameter, newest first

_State = dict[tuple, torch.Tensor]  # by kind, layer and number


class _NodeCache:
    """transformers' Cache as a recurrent module sees it: reads `before`, keeps `after`, writes nothing in place."""

    def __init__(self, before: _State):
        self.before = before
        self.after: _State = {}
        self.layers = _Layers(self)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.before.get(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.before.get(("recurrent", layer_idx, state_idx))

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, conv_kernel_size=None, **kwargs) -> torch.Tensor:
        """The columns before the node and its own, of which the last ones are kept."""
        before = self.get_conv_state(layer_idx, state_idx)
        kernel = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        if before is not None:
            conv_states = torch.cat([before, conv_states], -1)
        elif conv_states.shape[-1] < kernel:
            conv_states = F.pad(conv_states, (kernel - conv_states.shape[-1], 0))
        self.after["conv", layer_idx, state_idx] = conv_states[..., -kernel:]
        return conv_states

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs) -> torch.Tensor:
        self.after["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # keeps single tokens from the path of decoding, which writes into the state

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.before)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(bool(self.before))


class _Layers:
    """`cache.layers[i]`, which the modules of transformers < 5.20 read in the place of the cache's own methods."""

    def __init__(self, cache: _NodeCache):
        self.cache = cache

    def __getitem__(self, layer_idx: int) -> SimpleNamespace:
        def states(kind: str) -> dict[int, torch.Tensor]:
            return {key[2]: value for key, value in self.cache.before.items() if key[:2] == (kind, layer_idx)}

        return SimpleNamespace(conv_states=states("conv"), recurrent_states=states("recurrent"), record_past=True)


class _Watched(DynamicCache):
    """A cache that notes which module keeps a state in it."""

    def __init__(self, config, running: list[nn.Module]):
        super().__init__(config=config)
        self.running = running
        self.keepers: set[type[nn.Module]] = set()

    # DynamicCache's own raise where there is no attention layer.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def update_conv_state(self, *args, **kwargs):
        self.keepers.add(type(self.running[-1]))
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs):
        self.keepers.add(type(self.running[-1]))
        return super().update_recurrent_state(*args, **kwargs)


def recurrent_classes(decoder: nn.Module, input_ids: torch.Tensor) -> frozenset[type[nn.Module]]:
    """Classes of the modules that keep a state in the cache while `decoder` reads input_ids (1, T)."""
    running: list[nn.Module] = []
    cache = _Watched(decoder.config, running)
    hooks = []
    for module in decoder.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs: running.append(module)))
        hooks.append(module.register_forward_hook(lambda module, inputs, out: running.pop() and None, always_call=True))
    names = inspect.signature(type(decoder).forward).parameters
    try:
        with torch.no_grad():
            decoder(input_ids=input_ids, use_cache=True, **{next(name for name in _CACHE if name in names): cache})
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(cache.keepers)


def switch_recurrent(model: nn.Module, classes: frozenset[type[nn.Module]]) -> None:
    """Let the modules of these classes take a row's nodes, in place; without a plan they run as before."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = _over_nodes_class(type(module))  # type: ignore[arg-type]


@functools.cache
def _over_nodes_class(kind: type[nn.Module]) -> type[nn.Module]:
    parameters = inspect.signature(kind.forward).parameters
    cache_name = next(name for name in _CACHE if name in parameters)
    positional = list(parameters)[1:]  # but self

    class OverNodes(kind):
        def forward(self, *args, **kwargs):
            inputs = {**dict(zip(positional, args, strict=False)), **kwargs}
            row = inputs.pop(KEYWORD, None)
            if row is not None:
                return _over_row(kind, self, inputs, cache_name, row)
            if row_is_active() and not isinstance(inputs.get(cache_name), _NodeCache):
                raise RuntimeError(
                    f"{kind.__name__} did not get the row: its model does not hand keyword arguments to it, so it "
                    "would carry a state from one sequence into the next"
                )
            return kind.forward(self, *args, **kwargs)

    OverNodes.__name__, OverNodes.__qualname__ = kind.__name__, kind.__qualname__
    OverNodes.__module__ = kind.__module__
    return OverNodes


# Runs outside compiled graphs: nodes are data, and a layer compiled around it is the same for every plan.
@torch.compiler.disable
def _over_row(kind: type[nn.Module], module: nn.Module, inputs: dict[str, Any], cache_name: str, row: PackedRow) -> Any:
    inputs.pop(cache_name, None)
    hidden = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    if takes_whole_rows(kind, module, hidden):
        return over_whole_row(kind, module, inputs, row)
    return _over_nodes(functools.partial(kind.forward, module), inputs, cache_name, row.paths.states)


def _over_nodes(forward: Callable, inputs: dict[str, Any], cache_name: str, states: NodeStates) -> Any:
    """`forward(**inputs)`, whose token-wise tensors are (1, T, ...), in the batches of `states`."""
    tokens = states.places.shape[0]
    sizes = [len(batch.nodes) * batch.length for batch in states.batches]
    tokenwise = {
        name: value[0].index_select(0, states.rows).split(sizes)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == (1, tokens)
    }
    kept: dict[int, _State] = {}
    outputs = []
    for number, batch in enumerate(states.batches):
        shape = (len(batch.nodes), batch.length)
        before = {}
        if batch.parents:
            parents = [kept[parent] for parent in batch.parents]
            before = {key: torch.cat([state[key] for state in parents]) for key in parents[0]}
        cache = _NodeCache(before)
        here = {name: parts[number].unflatten(0, shape) for name, parts in tokenwise.items()}
        outputs.append(forward(**{**inputs, **here, cache_name: cache}))
        if batch.keeps:
            split = {key: state.split(1) for key, state in cache.after.items()}
            kept.update({node: {key: split[key][i] for key in split} for i, node in enumerate(batch.nodes)})
    flat = [tree_flatten(output) for output in outputs]
    row = [
        torch.cat([leaf.flatten(0, 1) for leaf in leaves]).index_select(0, states.places)[None]
        for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(row, flat[0][1])

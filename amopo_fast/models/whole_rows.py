"""Recurrent layers over a whole packed row at once, where their functions take it: a projection is computed once.

A mixer of transformers mixes tokens in two functions that its file takes from kernel packages: a causal convolution,
and a scan. Its forward runs once over the row, without a cache, and these two are given the row's nodes:

    convolution   the row with the columns before each node copied in front of it, one call
    scan          the nodes of one depth, one call with cu_seqlens and their parents' end states (fla's kernels)

Nothing is padded. A layer whose scan takes no cu_seqlens runs in the batches of `recurrent`. So does one whose scan
fails a trial on its own device: the miniature, which is on the CPU, never runs a package's kernels.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from amopo_fast.models.attention import PackedRow
from amopo_fast.packing.plan import Layout, Plan, plan_sequences
from amopo_fast.packing.states import HISTORY
from amopo_fast.packing.trie import Sequences
from amopo_kernels import gather_rows

logger = logging.getLogger(__name__)

_CONVOLUTION = "causal_conv1d_fn"  # the name in causal-conv1d, and so in every file of transformers


def takes_whole_rows(kind: type[nn.Module], module: nn.Module, hidden: Tensor) -> bool:
    """Whether `kind.forward` mixes tokens in functions that take all nodes of a row, and nowhere else.

    hidden: (1, T, H), of which dtype and device are looked at. The first call with them runs the trial.
    """
    functions = _functions(kind)
    scans = [function for name, function in functions.items() if name != _CONVOLUTION]
    widths = [each.kernel_size[0] for each in module.modules() if isinstance(each, nn.Conv1d)]
    return (
        bool(widths) == (_CONVOLUTION in functions)
        and max(widths, default=1) <= HISTORY + 1
        and bool(scans) == _keeps_recurrent_state(kind)  # type: ignore[arg-type]
        and bool(functions)
        and all(map(_takes_nodes, scans))
        and (not scans or _is_exact_here(kind, module, tuple(scans), hidden))
    )


def over_whole_row(kind: type[nn.Module], module: nn.Module, inputs: dict[str, Any], row: PackedRow) -> Any:
    """`kind.forward(module, **inputs)` of a packed row; inputs hold no cache."""
    forward = inspect.unwrap(kind.forward)
    replaced = {
        name: functools.partial(_convolve if name == _CONVOLUTION else _scan, function, row)
        for name, function in _functions(kind).items()
    }
    # The same code with other globals: the file's own functions stay as they are for every other model.
    bound = types.FunctionType(
        forward.__code__, {**forward.__globals__, **replaced}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound(module, **inputs)


def _functions(kind: type[nn.Module]) -> dict[str, Callable]:
    """The functions of its file, by name, in which a class's forward mixes tokens."""
    forward = inspect.unwrap(kind.forward)
    named = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    functions = {name: value for name, value in named.items() if inspect.isfunction(getattr(value, "func", value))}
    return {name: value for name, value in functions.items() if name == _CONVOLUTION or _goes_on(value)}


@functools.cache
def _goes_on(function: Callable) -> bool:
    """Whether a function goes on from a state and returns the next."""
    return {"initial_state", "output_final_state"} <= inspect.signature(function).parameters.keys()


@functools.cache
def _keeps_recurrent_state(kind: type[nn.Module]) -> bool:
    methods = [each for base in kind.__mro__ for each in vars(base).values() if inspect.isfunction(each)]
    return any("update_recurrent_state" in inspect.unwrap(each).__code__.co_names for each in methods)


@functools.cache
def _takes_nodes(function: Callable) -> bool:
    return "cu_seqlens" in inspect.signature(implementation(function)).parameters


def implementation(function: Callable) -> Callable:
    """What a function that transformers takes from a kernel package calls: the package's, or its own."""
    link: Any = function
    while link is not None:
        if inspect.isfunction(link) and "implementation" in (cells := inspect.getclosurevars(link).nonlocals):
            return cells["implementation"]
        link = getattr(link, "__wrapped__", None)
    return function


def _convolve(function: Callable, row: PackedRow, x: Tensor, *args, **kwargs) -> Tensor:
    """`function(x, ...)` of x (1, C, T), each node behind the columns before it on its path."""
    columns = row.paths.states.columns
    wide = gather_rows(x[0].transpose(0, 1), columns.rows, columns.order, columns.offsets, validate=False)
    wide = wide.masked_fill(columns.empty[:, None], 0)
    out = function(wide.transpose(0, 1)[None], *args, **kwargs)
    return out[0].transpose(0, 1).index_select(0, columns.places).transpose(0, 1)[None]


def _scan(function: Callable, row: PackedRow, *args, **kwargs) -> tuple[Tensor, None]:
    """`function(...)` whose token-wise tensors are (1, T, ...), a level of the trie in a call."""
    states = row.paths.states
    tokens = states.level_rows.shape[0]
    sizes = [level.cu_seqlens[-1] for level in states.levels]

    def levels(value) -> list:
        if isinstance(value, Tensor) and value.shape[:2] == (1, tokens):
            return [part[None] for part in value[0].index_select(0, states.level_rows).split(sizes)]
        return [value] * len(sizes)

    positional = [levels(value) for value in args]
    named = {name: levels(value) for name, value in kwargs.items()}
    outputs, kept = [], ()
    for number, level in enumerate(states.levels):
        cu_seqlens, cu_seqlens_cpu = row.level_cu_seqlens[number]
        before = torch.cat([kept[parent] for parent in level.parents]) if level.parents else None
        options = {name: parts[number] for name, parts in named.items()}
        options |= {"initial_state": before, "output_final_state": level.keeps, "cu_seqlens": cu_seqlens,
                    "cu_seqlens_cpu": cu_seqlens_cpu}  # fmt: skip
        output, after = function(*(parts[number] for parts in positional), **options)
        outputs.append(output[0])
        kept = after.split(1) if level.keeps else ()
    return torch.cat(outputs).index_select(0, states.level_places)[None], None


_judged: dict[tuple, bool] = {}
_TOLERANCE = 2e-2  # of the norm; bfloat16's rounding stays under 1e-2, a state or column of another node is above 0.1


def _is_exact_here(kind: type[nn.Module], module: nn.Module, scans: tuple[Callable, ...], hidden: Tensor) -> bool:
    """Whether a layer has the outputs and gradients of its separate sequences, with the kernels that it has here."""
    key = (kind, scans, hidden.dtype, hidden.device.type)
    if key not in _judged:
        modes = [(each, each.training) for each in module.modules()]
        module.eval()  # an adapter's dropout draws other numbers each time
        try:
            with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
                error = _error_here(kind, module, hidden)
            reason = f"its outputs or gradients differ by {error:.1e}"
            _judged[key] = error < _TOLERANCE
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
            _judged[key] = False
        finally:
            for each, mode in modes:
                each.training = mode
        if not _judged[key]:
            logger.warning("%s runs in padded batches, as its kernels fail on nodes: %s", kind.__name__, reason)
    return _judged[key]


def _itself(tensor: Tensor) -> Tensor:
    """Gradient checkpointing around the layer has other hooks, which would run it again."""
    return tensor


def _error_here(kind: type[nn.Module], module: nn.Module, hidden: Tensor) -> float:
    """The largest error of outputs and of the gradient of the hidden states, relative to their norms."""
    plan = _trial_plan().to(hidden.device)
    paths = plan.paths
    assert paths is not None
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(1, plan.num_tokens, hidden.shape[2], generator=random).to(hidden) for _ in range(2))
    x.requires_grad_()
    names = list(inspect.signature(kind.forward).parameters)[1:]
    found = over_whole_row(kind, module, {names[0]: x}, PackedRow(paths, "sdpa"))
    expected = torch.zeros_like(found)
    queries, keys = paths.cu_seqlens_q.tolist(), paths.cu_seqlens_k.tolist()
    for node in range(len(queries) - 1):
        begin, end = queries[node], queries[node + 1]
        alone = kind.forward(module, x[:, paths.kv_indices[keys[node] : keys[node + 1]]])
        expected = torch.cat([expected[:, :begin], alone[:, begin - end :], expected[:, end:]], 1)
    errors = []
    for first, second in (
        (found, expected),
        [torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected)],
    ):
        first, second = first.detach().double(), second.detach().double()
        errors.append(float((first - second).norm() / second.norm()))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


@functools.cache
def _trial_plan() -> Plan:
    """Six nodes in three levels: longer and shorter than a chunk of 64, one of a single token."""
    nodes = [np.arange(length) + 100 * number for number, length in enumerate((64, 32, 90, 1, 65, 7))]
    paths = ((0, 1, 2), (0, 1, 3), (0, 4), (5,))
    sequences = [np.concatenate([*(nodes[node] for node in path), [999]]) for path in paths]
    lengths = np.array([len(each) for each in sequences])
    ends = np.cumsum(lengths)
    whole = Sequences(np.concatenate(sequences), ends - lengths, lengths - 1, lengths, 1)
    return plan_sequences(whole, Layout.STATES, min_node_tokens=1)

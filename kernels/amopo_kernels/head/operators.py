"""The head as two torch operators, forward and backward, for every backend: what torch traces, fakes and maps.

An operator takes and returns tensors; what is not wanted is returned empty. The numbers and strings of a call are the
fields of Options, in their order. `function.py` makes one differentiable function of the two.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..errors import ReleasedTensorError
from . import kept_scores
from .kept_rows import KeptRows
from .options import SCHEMA, Options
from .problem import Forward, Gradients, Problem, RowStatistics
from .validation import check_labels
from .vocabulary_shard import sum_over_ranks


class Inputs(NamedTuple):
    """The tensors of a call; Problem says what they are."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    row_temperature: Tensor | None
    mean_shares: Tensor | None


class Outputs(NamedTuple):
    """Of the forward operator; RowStatistics and Forward say what they are. Not wanted: empty."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor
    top1: Tensor
    log_sum_p2: Tensor
    maximum: Tensor
    log_sum: Tensor
    miss: Tensor
    unit_d_hidden: Tensor
    cache: Tensor
    strip_maximum: Tensor


class Kept(NamedTuple):
    """What the backward operator takes of the forward's outputs."""

    logps: Tensor
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor
    miss: Tensor
    cache: Tensor
    strip_maximum: Tensor


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_temperature, Tensor? mean_shares"
# Not torch.library.custom_op, whose first call imports torch._dynamo: seconds, and Triton.
_LIBRARY = torch.library.Library("amopo_kernels", "FRAGMENT")


def _implementation(backend: str) -> ModuleType:
    """`forward` and `backward` of a Problem; Triton is imported where it runs."""
    if backend == "torch":
        from . import torch_slices

        return torch_slices
    from . import passes

    return passes


def _problem(inputs: Inputs, options: Options, kept: KeptRows | None) -> Problem:
    if kept is not None:
        inputs = inputs._replace(
            hidden=kept.take(inputs.hidden), labels=kept.take(inputs.labels),
            row_temperature=kept.take(inputs.row_temperature, fill=1),
        )  # fmt: skip
    if options.group:
        inputs = inputs._replace(labels=inputs.labels - options.first)
    problem = Problem(*inputs[:4], options, *inputs[4:], None if kept is None else kept.count)
    return problem if options.backend == "torch" else problem.for_triton()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


_LIBRARY.define(f"linear_logps({_INPUTS}, {SCHEMA}) -> ({', '.join(['Tensor'] * len(Outputs._fields))})")
_LIBRARY.define(f"""linear_logps_backward(
    {", ".join(f"Tensor? grad_{name}" for name in Gradients._fields)}, {_INPUTS},
    {", ".join(f"Tensor {name}" for name in Kept._fields)},
    bool need_hidden, bool need_weight, bool need_bias, {SCHEMA}
) -> (Tensor, Tensor, Tensor)""")


@torch.library.impl(_LIBRARY, "linear_logps", "CompositeExplicitAutograd")
def _forward(*arguments):
    """Inputs and Options -> Outputs."""
    inputs, options = Inputs(*arguments[:6]), Options(*arguments[6:])
    hidden = inputs.hidden
    if options.check_labels:
        check_labels(inputs.labels, options.vocabulary or inputs.weight.shape[0], options.ignore_index)
    dispatch.count(options.backend, options.mode)
    kept = KeptRows.of(inputs.labels, options)
    # Triton launches on the current device, and autocast must not round operands anew; so in both operators.
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        forward = _implementation(options.backend).forward(_problem(inputs, options, kept))
        if options.group and forward.unit_d_hidden is not None:
            sum_over_ranks(options.group, forward.unit_d_hidden)
    rows = forward.rows
    of_rows = [
        rows.logps, rows.entropy, rows.lse, rows.mean_logit, rows.top1, rows.log_sum_p2, rows.maximum, rows.log_sum,
        rows.miss, forward.unit_d_hidden,
    ]  # fmt: skip
    strip_maximum = forward.strip_maximum
    if kept is not None:
        of_rows = [kept.put(x) for x in of_rows]
        strip_maximum = kept.put(strip_maximum) if options.keep_scores else strip_maximum
    return tuple(_empty(hidden, 0) if x is None else x for x in (*of_rows, forward.cache, strip_maximum))


@torch.library.register_fake("amopo_kernels::linear_logps", lib=_LIBRARY)
def _fake_forward(*arguments):
    inputs, options = Inputs(*arguments[:6]), Options(*arguments[6:])
    hidden, N = inputs.hidden, inputs.hidden.shape[0]
    result = torch.promote_types(options.dtype, torch.float32)

    def per_row(wanted: str | None = None, dtype: torch.dtype = result) -> Tensor:
        there = wanted is None or options.wants(wanted)
        return _empty(hidden, N, dtype=dtype) if there else _empty(hidden, 0)

    cache, strip_maximum = _empty(hidden, 0), _empty(hidden, 0)
    if options.mode == "cached":
        from .layout import Layout

        layout = Layout.of(hidden, inputs.weight.shape[0], options)
        if layout.cached:
            cache = _empty(hidden, N, layout.cache_width, dtype=options.dtype)
            strip_maximum = _empty(hidden, layout.cached_strips, N)
    if options.keep_scores:
        from .torch_slices import slice_columns

        cache = _empty(hidden, inputs.weight.numel() + 1, dtype=options.dtype)
        strip_maximum = _empty(hidden, N, -(-inputs.weight.shape[0] // slice_columns(hidden.device)), dtype=result)
    return Outputs(
        logps=per_row(), entropy=per_row("entropy"), lse=per_row("lse"), mean_logit=per_row("mean_logit"),
        top1=per_row("top1", torch.int64), log_sum_p2=per_row("log_sum_p2"),
        maximum=per_row(), log_sum=per_row(), miss=per_row(),
        unit_d_hidden=_empty(hidden, *hidden.shape, dtype=result) if options.mode == "frozen" else _empty(hidden, 0),
        cache=cache, strip_maximum=strip_maximum,
    )  # fmt: skip


@torch.library.impl(_LIBRARY, "linear_logps_backward", "CompositeExplicitAutograd")
def _backward(*arguments):
    """Gradients, Inputs, Kept, what is needed and Options -> those gradients in their tensors' dtypes, others empty."""
    gradients, inputs, saved, needed, options = _backward_arguments(arguments)
    hidden, weight, bias = inputs[:3]
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            _refuse_released(name, x)
    kept = KeptRows.of(inputs.labels, options)
    entropy = saved.entropy if options.wants("entropy") else None
    rows = RowStatistics(saved.logps, saved.maximum, saved.log_sum, saved.miss, entropy)
    cache, strip_maximum = saved.cache, saved.strip_maximum
    if kept is not None:
        gradients, rows = Gradients(*map(kept.take, gradients)), RowStatistics(*map(kept.take, rows))
        strip_maximum = kept.take(strip_maximum) if options.keep_scores else strip_maximum
    problem, implementation = _problem(inputs, options, kept), _implementation(options.backend)
    d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needed[2] else None
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        if options.keep_scores and kept_scores.are_spent(cache):
            cache = implementation.keep_again(problem, strip_maximum)
        d_weight = None
        if needed[1] and options.keep_scores:
            cache, d_weight = kept_scores.become_gradient(cache, weight)
        elif needed[1]:
            d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        d_hidden = implementation.backward(
            problem, Forward(rows, cache=cache, strip_maximum=strip_maximum),
            gradients, need_hidden=needed[0], d_weight=d_weight, d_bias=d_bias,
        )  # fmt: skip
    if d_hidden is not None:
        if options.group:
            sum_over_ranks(options.group, d_hidden)
        d_hidden = d_hidden.to(hidden.dtype)
        d_hidden = d_hidden if kept is None else kept.put(d_hidden)
    return tuple(_empty(hidden, 0) if x is None else x for x in (d_hidden, d_weight, d_bias))


# Of the operators by name, for tools that look inside: an operator of Python's hides from dispatch modes what it calls.
IMPLEMENTATIONS = {"linear_logps": _forward, "linear_logps_backward": _backward}


@torch.library.register_fake("amopo_kernels::linear_logps_backward", lib=_LIBRARY)
def _fake_backward(*arguments):
    _, inputs, _, needed, _ = _backward_arguments(arguments)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else _empty(inputs.hidden, 0)
        for x, need in zip(inputs, needed, strict=False)
    )


def _backward_arguments(arguments: tuple) -> tuple[Gradients, Inputs, Kept, tuple[bool, bool, bool], Options]:
    gradients, inputs, kept = arguments[:4], arguments[4:10], arguments[10:17]
    return Gradients(*gradients), Inputs(*inputs), Kept(*kept), arguments[17:20], Options(*arguments[20:])


def _refuse_released(name: str, x: Tensor) -> None:
    """FSDP and ZeRO-3 empty a gathered parameter after the forward of its module."""
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and x.untyped_storage().nbytes() < (last + 1) * x.element_size():
        raise ReleasedTensorError(
            f"the memory of {name} was released between the forward and the backward pass, which computes with it; "
            "call linear_logps inside the forward of the module that FSDP or ZeRO-3 wraps, so that it is gathered for "
            "both passes"
        )


linear_logps = torch.ops.amopo_kernels.linear_logps.default
linear_logps_backward = torch.ops.amopo_kernels.linear_logps_backward.default

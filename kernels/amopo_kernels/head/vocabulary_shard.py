"""A head whose vocabulary is sharded over the ranks of a process group: every rank has the same rows and its tokens.

    forward    a rank's strips become one; all ranks' strips are gathered, with the label's logit from the rank that has
               it, and merged as the strips of one rank are: 3 numbers a row and rank, more with other outputs
    backward   dW and db of a rank's own tokens; dX is summed over the ranks, once

The order of the ranks is fixed, so all of them have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ShardedTensorError
from .problem import LOWEST, Problem, Tables
from .shard import WHOLE, VocabularyShard

_NO_TOKEN = 2**31 - 1


def take_shard(
    weight: Tensor, bias: Tensor | None, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, VocabularyShard]:
    """(weight, bias, shard) of this rank; a DTensor that is Shard(0) over the group gives its local tensor.

    Raises:
        ShardedTensorError: a DTensor that is sharded otherwise.
    """
    if process_group is None:
        return weight, bias, WHOLE
    if type(weight).__name__ != "DTensor":
        return weight, bias, VocabularyShard.of(weight, process_group)
    vocabulary, ranks, rank = weight.shape[0], process_group.size(), process_group.rank()
    local = _local("weight", weight, process_group)
    first = min(rank * -(-vocabulary // ranks), vocabulary)  # as torch.chunk, which Shard is
    bias = _local("bias", bias, process_group) if type(bias).__name__ == "DTensor" else bias
    return local, bias, VocabularyShard(process_group.group_name, first, vocabulary)


def _local(name: str, tensor, process_group: dist.ProcessGroup) -> Tensor:
    mesh = tensor.device_mesh
    sharded = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    fits = len(sharded) == 1 and tensor.placements[sharded[0]].is_shard(0)
    if not fits or mesh.get_group(sharded[0]).group_name != process_group.group_name:
        raise ShardedTensorError(
            f"{name} is a DTensor of {tuple(tensor.placements)}; with process_group it must be Shard(0) over that "
            "group, and replicated otherwise"
        )
    return tensor.to_local()


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def sum_over_ranks(group: str, x: Tensor) -> Tensor:
    """In place."""
    dist.all_reduce(x, group=_group(group))
    return x


def gather_strips(
    problem: Problem, tables: Tables, label_logit: Tensor, scale: float | Tensor, exp: Callable[[Tensor], Tensor]
) -> tuple[Tables, Tensor]:
    """(tables of a strip a rank (ranks, N), the label's logit (N,)), whatever rank it is on.

    Args:
        tables: (strips, N) of this rank. scale: from differences of logits to exponents of `exp`, a number or (N,).
    """
    mine = _one_strip(tables, problem, scale, exp)
    here = (problem.labels >= 0) & (problem.labels < problem.vocabulary)
    parts = {name: _as_floats(x, label_logit) for name, x in mine._asdict().items() if x is not None}
    packet = torch.stack([*parts.values(), torch.where(here, label_logit, 0.0), here.to(label_logit.dtype)])
    group = _group(problem.options.group)
    packets = [torch.empty_like(packet) for _ in range(group.size())]
    dist.all_gather(packets, packet, group=group)
    *rows, logits, theirs = torch.stack(packets, 1)
    found = dict(zip(parts, rows, strict=True))
    if "top" in found:
        found["top"] = _as_tokens(found["top"].contiguous())
    gathered = Tables(**{name: found.get(name) for name in Tables._fields})
    return gathered, logits.sum(0).masked_fill(theirs.sum(0) == 0, float("nan"))


def _one_strip(tables: Tables, problem: Problem, scale: float | Tensor, exp: Callable[[Tensor], Tensor]) -> Tables:
    """(N,) each, of all columns of this rank; tokens as all ranks count them."""
    if not len(tables.maximum):
        nothing = tables.maximum.new_zeros(problem.rows)
        no_token = torch.full_like(nothing, _NO_TOKEN, dtype=torch.int32)
        rows = {name: None if x is None else nothing for name, x in tables._asdict().items()}
        return Tables(**rows | {"maximum": nothing + LOWEST, "top": None if tables.top is None else no_token})
    maximum = tables.maximum.amax(0)
    distance = (tables.maximum - maximum) * scale
    share = exp(distance)
    weighted = squares = mean = top = None
    if tables.weighted is not None:
        more = share * (tables.weighted + tables.total * distance)
        weighted = torch.where(tables.total > 0, more, 0.0).sum(0)
    if tables.squares is not None:
        squares = (share.square() * tables.squares).sum(0)
    if tables.mean is not None:
        mean = tables.mean.sum(0)
    if tables.top is not None:
        top = tables.top.gather(0, tables.maximum.argmax(0, keepdim=True)).squeeze(0) + problem.options.first
    return Tables(maximum, (share * tables.total).sum(0), weighted, squares, mean, top)


def _as_floats(x: Tensor, like: Tensor) -> Tensor:
    """Tokens travel as the bits of a float32, or as a float64."""
    if x.dtype != torch.int32:
        return x
    return x.view(torch.float32) if like.dtype == torch.float32 else x.to(like.dtype)


def _as_tokens(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x.to(torch.int32)

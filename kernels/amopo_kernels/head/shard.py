"""Which part of a vocabulary a rank has; vocabulary_shard.py computes with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """What a rank has of a vocabulary."""

    group: str  # name of the process group; "": the whole vocabulary is here
    first: int  # token of the weight's first row
    vocabulary: int  # tokens of all ranks

    @staticmethod
    def of(weight: Tensor, process_group: dist.ProcessGroup) -> VocabularyShard:
        """Of a plain weight: collective, and reads the sizes of all ranks."""
        size = torch.tensor([len(weight)], device=weight.device)
        sizes = [torch.empty_like(size) for _ in range(process_group.size())]
        dist.all_gather(sizes, size, group=process_group)
        sizes = torch.cat(sizes).tolist()
        rank = process_group.rank()
        return VocabularyShard(process_group.group_name, sum(sizes[:rank]), sum(sizes))


WHOLE = VocabularyShard("", 0, 0)

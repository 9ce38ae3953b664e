"""`--logits_cache_gib auto`: how much of its probabilities the head keeps, chosen once for a run and stored with it.

A kept probability is rounded before its gradient is, so a run's numbers depend on how many are kept. The choice is a
function of the model, the options, the longest micro-batch and the GPU's memory in whole GiB, and not of what happens
to be free when a step runs; a checkpoint holds it, and a resume repeats it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from amopo_fast.memory.estimate import FILLED, Row, Setup, cache_bytes, estimate
from amopo_fast.memory.gpus import GIB
from amopo_fast.models.architecture import language_model_of
from amopo_fast.models.choice import choice_of
from amopo_fast.models.head import head_of
from amopo_fast.packing.schedule import Epoch
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.loading import run_of
from amopo_kernels.dispatch import choose_backend

if TYPE_CHECKING:
    from amopo_fast.training.config import AMoPOConfig

logger = logging.getLogger(__name__)

SHARES = (1.0, 0.75, 0.5, 0.25)  # of all probabilities of the longest micro-batch


def bytes_that_fit(config: PretrainedConfig, row: Row, setup: Setup, memory: int) -> int:
    """The largest of SHARES, in whole MiB, with which the estimate fits into FILLED of `memory` bytes; 0: none does.

    Raises:
        ValueError: as `estimate`.
    """
    room = FILLED * (memory // GIB * GIB)
    whole = cache_bytes(config, row)
    for share in SHARES:
        size = -(-int(share * whole) // 2**20) * 2**20
        if size and estimate(config, row, replace(setup, head_cache=size)).needed <= room:
            return size
    return 0


class HeadCache:
    """Bytes for the head's cache, `logits_cache_bytes` of every call: those that were asked for, or `choose`n."""

    def __init__(self, args: AMoPOConfig):
        self.args = args
        self.bytes = args.logits_cache_bytes or 0
        self._open = False  # to what a checkpoint says

    def choose(self, model: nn.Module, pairs: Sequence[PairTokens], epoch: Epoch) -> str:
        """Settle "auto" for a loaded model and the run's first epoch, the same on every rank. Returns a line that says
        so, or ""."""
        device = self.args.device
        self._open = self._keeps(model)
        if not self._open:
            return ""
        # Of this process: what is free, and what it holds already.
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        row, setup = run_of(self.args, model, pairs, epoch)
        try:
            self.bytes = bytes_that_fit(model.config, row, setup, memory)
        except Exception as error:  # a model's own code, of a configuration that nothing can be predicted for
            logger.warning("logits_cache_gib auto: 0, as the memory of a step cannot be predicted: %s", error)
        if self.args.world_size > 1:
            least = torch.tensor(self.bytes, device=device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            self.bytes = int(least)
        return f"logits_cache_gib: {self.bytes / GIB:.2f}, chosen from {memory // GIB} GiB"

    def _keeps(self, model: nn.Module) -> bool:
        """Whether there is something to choose: a head that is trained, on a backend that can keep something."""
        args = self.args
        if args.logits_cache_bytes is not None or args.device.type != "cuda" or args.deepspeed is not None:
            return False
        if choice_of(model).head is None:  # whose logits are the model's own
            return False
        weight, _ = head_of(language_model_of(model))
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype
        backend = choose_backend(args.kernel_backend, torch.empty(0, weight.shape[-1], device=args.device), dtype)
        return weight.requires_grad and backend != "torch"

    def state_dict(self) -> dict:
        return {"bytes": self.bytes}

    def load_state_dict(self, state: dict) -> None:
        if self._open and state["bytes"] != self.bytes:
            logger.warning("logits_cache_gib: %.2f, as the checkpoint has it, and not the %.2f of this GPU; a number "
                           "that is given holds", state["bytes"] / GIB, self.bytes / GIB)  # fmt: skip
            self.bytes = state["bytes"]

    def combine_states(self, states: list[dict], rank: int) -> dict:
        return states[0]

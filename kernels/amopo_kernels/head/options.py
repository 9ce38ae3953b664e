"""What a call of the head computes and how: decided once, before anything runs, and handed down whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import dispatch
from .shard import WHOLE, VocabularyShard

# What else a pass can return of every row. The first three are differentiable.
OUTPUTS = ("entropy", "lse", "mean_logit", "top1", "log_sum_p2")
# Logits of a slice, by Triton backend: what `layout.slice_columns` aims at and the memory estimate counts.
SLICE_LOGITS = {"fused": 2**26, "chunked": 2**24}


@dataclass(frozen=True)
class Options:
    """Everything of a call but its tensors."""

    softcap: float | None
    temperature: float  # 1 where every row has its own
    ignore_index: int | None  # None: no row is ignored
    outputs: str  # of OUTPUTS, with commas
    dtype: torch.dtype  # of the matmuls' inputs
    backend: str  # "torch", "chunked" or "fused"
    mode: str  # how the gradient is had, one of dispatch.MODES
    cache_bytes: int  # for the probabilities that mode "cached" keeps
    check_labels: bool  # read them and refuse bad ones
    read_rows: bool  # read which rows are ignored, so that the others alone are computed
    group: str = ""  # as VocabularyShard has them, for a vocabulary that is sharded
    first: int = 0
    vocabulary: int = 0
    keep_scores: bool = False  # from the forward on, in the memory of the weight's gradient

    def flat(self) -> tuple:
        """The fields in order, as a torch operator takes them; Options(*flat) is the way back."""
        return tuple([getattr(self, name) for name in NAMES])

    def wants(self, output: str) -> bool:
        return output in self.outputs.split(",")

    @property
    def extra_tables(self) -> bool:
        """Whether an output needs more of a strip than its maximum and its sum."""
        return not {"", "lse"}.issuperset(self.outputs.split(","))


NAMES = tuple(field.name for field in fields(Options))
_SCHEMA_TYPES = {
    "float | None": "float?", "int | None": "int?", "float": "float", "int": "int", "bool": "bool", "str": "str",
    "torch.dtype": "ScalarType",
}  # fmt: skip
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(Options))


def choose_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    temperature: float | Tensor,
    ignore_index: int | None,
    outputs: Sequence[str],
    backend: str,
    validate: bool | None,
    cache_bytes: int = 0,
    shard: VocabularyShard = WHOLE,
) -> Options:
    """The options of a call with checked shapes: the matmuls' dtype by torch's rules, backend and mode by `dispatch`.

    Raises:
        ValueError: softcap, temperature, outputs, backend. BackendUnavailableError, UnsupportedError: as `dispatch`.
    """
    number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    for name, value in (("temperature", number), ("softcap", 1.0 if softcap is None else float(softcap))):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    for output in outputs:
        if output not in OUTPUTS:
            raise ValueError(f"outputs has {output!r}; choose among {', '.join(OUTPUTS)}")
    device = hidden.device.type
    # torch 2.11 cannot trace the first question; what is compiled is on a device that has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    autocast = available and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    backend = dispatch.choose_backend(backend, hidden, dtype)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    mode = dispatch.choose_mode(backend, dtype, cache_bytes=cache_bytes, frozen=needed == [True, False, False])
    if not any(needed):
        mode = "exact"  # which keeps nothing
    on_cpu = hidden.device.type == "cpu"
    read = on_cpu if validate is None else validate
    keep_scores = mode == "exact" and backend == "torch" and needed[1] and on_cpu and softcap is None
    keep_scores &= hidden.dtype == weight.dtype == dtype and _can_keep(dtype, outputs)
    keep_scores &= not torch.compiler.is_compiling()  # it takes no output for the memory of an input
    return Options(
        softcap, number, ignore_index, ",".join(outputs), dtype, backend, mode, cache_bytes,
        # Whose kept rows would be as many as labels say, which nothing that is traced can know.
        check_labels=read, read_rows=mode != "cached" and (read or on_cpu and backend == "torch"),
        group=shard.group, first=shard.first, vocabulary=shard.vocabulary, keep_scores=keep_scores,
    )  # fmt: skip


def _can_keep(dtype: torch.dtype, outputs: Sequence[str]) -> bool:
    """Exponentials may be rounded to bfloat16, as what becomes of them is; an entropy's scores may not."""
    if dtype == torch.bfloat16:
        return "entropy" not in outputs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype in (torch.float32, torch.float64)

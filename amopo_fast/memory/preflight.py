"""Does a run fit into the GPU? The estimate for its longest micro-batch beside the memory that is free."""

from __future__ import annotations

from pathlib import Path

import psutil
from transformers import PretrainedConfig

from amopo_fast.errors import OptionError
from amopo_fast.memory.advice import first_remedy
from amopo_fast.memory.estimate import GIB, Estimate, Row, Setup, estimate
from amopo_fast.packing.plan import Plan
from amopo_fast.packing.schedule import Epoch, MicroBatch, PairSizes


class DoesNotFit(OptionError):
    """The run needs more memory than the GPU has; the message names both and a change that fits."""


def free_host_memory() -> int:
    """Bytes that this process can still take: what the machine has available, or less where a container is limited."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no cgroup of version 2
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def require_host_memory(name: str, prediction: Estimate, free: int) -> None:
    """Refuse to pin more of the host's memory than is free, before anything is loaded.

    Raises:
        DoesNotFit
    """
    if prediction.host_needed > free:
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in prediction.host.items())
        raise DoesNotFit(
            f"{name}: this run pins {prediction.host_needed / GIB:.1f} GiB of host memory ({parts}), and "
            f"{free / GIB:.1f} GiB are free there; use --optim_in_backward adamw_4bit, raise the container's limit, or "
            "leave --weights host or --optimizer_states host out; --memory_check false skips this check"
        )


def row_of(plan: Plan) -> Row:
    keys = plan.num_tokens if plan.paths is None else plan.paths.kv_indices.shape[0]
    return Row(plan.num_tokens, plan.labels.shape[0], keys, plan.longest, plan.input_ids.shape[0])


def longest_micro_batch(epoch: Epoch, sizes: PairSizes) -> MicroBatch:
    """The epoch's micro-batch with the most computed tokens."""
    return max(epoch.batches, key=lambda batch: sizes.tokens(batch.pairs))


def require_fit(name: str, config: PretrainedConfig, row: Row, setup: Setup, free: int) -> Estimate:
    """The estimate of a run of the model `name`, if it fits into `free` bytes.

    Raises:
        DoesNotFit
    """
    prediction = estimate(config, row, setup)
    if prediction.needed <= free:
        return prediction
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in prediction.parts.items() if size > GIB / 20)
    remedy = first_remedy(config, row, setup, free)
    change = "no change of optimizer, precision or adapter makes it fit: share the model between GPUs"
    if remedy:
        change = f"what fits, in {remedy[1].needed / GIB:.1f} GiB: {remedy[0]}"
    raise DoesNotFit(
        f"{name}: this run needs about {prediction.needed / GIB:.1f} GiB on each GPU ({parts}, for {row.tokens} "
        f"computed tokens in the longest micro-batch), and {free / GIB:.1f} GiB are free; {change}. `amopo-fast "
        "estimate` compares all ways; --memory_check false skips this check"
    )

"""Does a run fit into the GPU? The estimate for its longest micro-batch beside the memory that is free."""

from __future__ import annotations

from transformers import PretrainedConfig

from amopo_fast.errors import OptionError
from amopo_fast.memory.advice import first_remedy
from amopo_fast.memory.estimate import GIB, Estimate, Row, Setup, estimate
from amopo_fast.packing.plan import Plan
from amopo_fast.packing.schedule import Epoch, MicroBatch, PairSizes


class DoesNotFit(OptionError):
    """The run needs more memory than the GPU has; the message names both and a change that fits."""


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

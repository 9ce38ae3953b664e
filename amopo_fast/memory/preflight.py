"""Does a run fit into the machine? The estimate for its longest micro-batch beside the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from amopo_fast.errors import OptionError
from amopo_fast.memory.advice import cheapest_change
from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate
from amopo_fast.memory.gpus import GIB, Gpu
from amopo_fast.memory.speed import copied, time_of
from amopo_fast.packing.plan import Plan
from amopo_fast.packing.schedule import Epoch, MicroBatch, PairSizes

_LEAST_ROW = 512  # tokens, that a default is lowered to


class DoesNotFit(OptionError):
    """The run needs more memory than there is; the message names both and a change that fits."""


@dataclass(frozen=True)
class Room:
    """What is free where a run is to go: of a GPU (None: it computes on the CPU) and of the host, bytes; of the host of
    a GPU that is not here None: it is not known."""

    gpu: Gpu | None
    host: int | None

    def fits(self, prediction: Estimate) -> bool:
        if self.gpu is None:
            return prediction.needed_on_cpu <= self.host
        # What pins nothing is started with whatever the host has.
        counts = bool(prediction.pinned) and self.host is not None
        return prediction.needed <= self.gpu.memory and (not counts or prediction.host_needed <= self.host)


def free_host_memory() -> int:
    """Bytes that this process can still take: what the machine has available, or less where a container is limited."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no cgroup of version 2
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def row_of(plan: Plan) -> Row:
    keys = plan.num_tokens if plan.paths is None else plan.paths.kv_indices.shape[0]
    return Row(plan.num_tokens, plan.labels.shape[0], keys, plan.longest, plan.input_ids.shape[0])


def longest_micro_batch(epoch: Epoch, sizes: PairSizes) -> MicroBatch:
    """The epoch's micro-batch with the most computed tokens."""
    return max(epoch.batches, key=lambda batch: sizes.tokens(batch.pairs))


def row_that_fits(tokens: int, fits: Callable[[int], bool]) -> int:
    """The largest of tokens, tokens / 2, ..., 512 of a micro-batch that fits; if none does, the least."""

    def halves() -> Iterator[int]:
        each = tokens
        while each > _LEAST_ROW:
            yield each
            each //= 2

    return next((each for each in halves() if fits(each)), min(tokens, _LEAST_ROW))


def require_fit(name: str, config: PretrainedConfig, row: Row, setup: Setup, room: Room) -> Estimate:
    """The estimate of a run of the model `name`, if it fits.

    Raises:
        DoesNotFit
    """
    prediction = estimate(config, row, setup)
    if room.fits(prediction):
        return prediction
    change = cheapest_change(config, row, setup, room.fits, room.gpu)
    advice = "no change of optimizer, precision or adapter makes it fit"
    advice += ": share the model between GPUs" if room.gpu else ": it needs a GPU, or a machine with more memory"
    if change:
        slower = f", {change.slower:.0%} slower by arithmetic" if change.slower > 0.02 else ""
        size = change.prediction.needed if room.gpu else change.prediction.needed_on_cpu
        advice = f"what fits, in {size / GIB:.1f} GiB{slower}: {change}"
    raise DoesNotFit(
        f"{name}: this run {_shortage(prediction, row, room)}; {advice}. `amopo-fast estimate` compares all ways; "
        "--memory_check false skips this check"
    )


def _shortage(prediction: Estimate, row: Row, room: Room) -> str:
    def listed(parts: dict[str, int]) -> str:
        return ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size > GIB / 20)

    parts = f"{listed(prediction.parts)}, for {row.tokens} computed tokens in the longest micro-batch"
    if room.gpu is None:
        free = f"{room.host / GIB:.1f} GiB are free"
        return f"needs about {prediction.needed_on_cpu / GIB:.1f} GiB of memory ({parts}), and {free}"
    if prediction.needed > room.gpu.memory:
        free = f"{room.gpu.memory / GIB:.1f} GiB are free"
        return f"needs about {prediction.needed / GIB:.1f} GiB on each GPU ({parts}), and {free}"
    return (f"pins {prediction.host_pinned / GIB:.1f} GiB of host memory ({listed(prediction.pinned)}) beside "
            f"{sum(prediction.unpinned.values()) / GIB:.1f} GiB for process and loading, and {room.host / GIB:.1f} GiB "
            "are free there (or raise the container's limit)")  # fmt: skip


def fit_line(dtype: torch.dtype, prediction: Estimate, room: Room) -> str:
    """What a run that fits will need, beside what is free."""
    weights = f"weights in {str(dtype).removeprefix('torch.')}"
    if room.gpu is None:
        return f"{weights}; about {prediction.needed_on_cpu / GIB:.1f} of {room.host / GIB:.1f} GiB free will be needed"
    pinned = f", and {prediction.host_pinned / GIB:.1f} GiB of pinned host memory" if prediction.pinned else ""
    of = f"{room.gpu.memory / GIB:.1f} GiB free on each GPU"
    return f"{weights}; about {prediction.needed / GIB:.1f} of {of} will be needed{pinned}"


def copies_line(prediction: Estimate, gpu: Gpu) -> str:
    """What a step copies between host and GPU and whether that hides; "" if nothing."""
    time = time_of(prediction, gpu)
    to_device, to_host = copied(prediction, gpu)
    if not to_device:
        return ""
    source = "measured" if gpu.measured else "assumed"
    text = (f"a step copies {to_device / GIB:.1f} GiB to the GPU and {to_host / GIB:.1f} back, at "
            f"{source} {gpu.to_device / 1e9:.0f} and {gpu.to_host / 1e9:.0f} GB/s")  # fmt: skip
    if time is None:
        return text
    hidden = "which hides behind" if time.hides else f"of which {time.exposed:.1f} s do not hide behind"
    return f"{text}: {time.to_device:.1f} and {time.to_host:.1f} s, {hidden} {time.compute:.1f} s of computation"

"""Which ways to train fit into a GPU, and the cheapest change that makes one fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate
from amopo_fast.memory.gpus import GPUS, Gpu
from amopo_fast.memory.speed import time_of

BF16, CHECKPOINTING = "--weight_precision bf16_stochastic", "--gradient_checkpointing true"
STATES_ON_HOST, WEIGHTS_ON_HOST = "--optimizer_states host", "--weights host"
OWN_OPTIM = "--optim adamw_torch_fused"  # the default
OFFLOAD = """--gradient_checkpointing_kwargs '{"offload": true}'"""
_8BIT = Setup(states="8bit", in_backward=True)
_4BIT = Setup(states="4bit", in_backward=True)
_8BIT_HOST, _4BIT_HOST = (replace(setup, host_states=True) for setup in (_8BIT, _4BIT))
OPTIMIZERS: dict[str, tuple[Setup, str]] = {
    "AdamW, fp32 weights": (Setup(weights="fp32"), "--weight_precision fp32"),
    "fp32, in backward": (
        Setup(weights="fp32", in_backward=True), "--weight_precision fp32 --optim_in_backward adamw"),
    "AdamW, bf16 weights": (Setup(), BF16),
    "AdamW 8-bit, bf16": (Setup(states="8bit"), f"{BF16} --optim adamw_torch_8bit"),
    "8-bit, in backward": (_8BIT, f"{BF16} --optim_in_backward adamw_8bit"),
    "4-bit, in backward": (_4BIT, f"{BF16} --optim_in_backward adamw_4bit"),
    "8-bit on the host": (
        _8BIT_HOST, f"{BF16} --optim_in_backward adamw_8bit {STATES_ON_HOST}"),
    "4-bit on the host": (
        _4BIT_HOST, f"{BF16} --optim_in_backward adamw_4bit {STATES_ON_HOST}"),
    "8-bit, weights too": (
        replace(_8BIT_HOST, host_weights=True),
        f"{BF16} --optim_in_backward adamw_8bit {STATES_ON_HOST} {WEIGHTS_ON_HOST}"),
    "4-bit, weights too": (
        replace(_4BIT_HOST, host_weights=True),
        f"{BF16} --optim_in_backward adamw_4bit {STATES_ON_HOST} {WEIGHTS_ON_HOST}"),
    "LoRA, rank 16": (Setup(lora_rank=16), "--use_peft true"),
    "QLoRA, rank 16": (Setup(lora_rank=16, quantised=True), "--use_peft true --load_in_4bit true"),
}  # fmt: skip
_LEAST_TOKENS = 1024  # of a row that is advised
_ALIKE = 0.02  # differences of speed below it decide nothing


@dataclass(frozen=True)
class Change:
    """Options beside the present ones, and what they lead to. slower: time per token over the present one's, less 1.
    fewer_pairs: a step must have fewer, as one that is taken in the backward pass is one micro-batch."""

    flags: str
    prediction: Estimate
    slower: float
    fewer_pairs: bool = False

    def __str__(self) -> str:
        return self.flags + ("; lower pairs_per_step until a step is one micro-batch" if self.fewer_pairs else "")


@dataclass(frozen=True)
class _Way:
    setup: Setup
    flags: tuple[str, ...] = ()
    coarser: int = 0  # what of the numbers is given up: bits of weights and states

    def but(self, *flags: str, coarser: int = 0, **changes) -> _Way:
        return _Way(replace(self.setup, **changes), (*self.flags, *flags), self.coarser + coarser)


def _optimizers(way: _Way) -> Iterator[_Way]:
    """All weights: their precision and the optimizer, ever coarser."""
    yield way
    precisions = [way]
    if way.setup.weights == "fp32":
        precisions.append(way.but(BF16, coarser=1, weights="bf16"))
        yield precisions[-1]
    if way.setup.gpus > 1:
        return
    for each, (number, states) in itertools.product(precisions, enumerate(("fp32", "8bit", "4bit"))):
        kinds = ["fp32", "8bit", "4bit"]
        now = kinds.index(each.setup.states) if each.setup.states in kinds else 0
        if number > now or (number == now and not each.setup.in_backward):
            name = "adamw" if states == "fp32" else f"adamw_{states}"
            # What has codes without it was given by --optim, which does not go with it.
            instead = [OWN_OPTIM] if now and not each.setup.in_backward else []
            yield each.but(*instead, f"--optim_in_backward {name}", coarser=number - now, states=states,
                           in_backward=True, accumulates=False)  # fmt: skip


def _activations(way: _Way, on_gpu: bool) -> Iterator[_Way]:
    yield way
    if not way.setup.checkpointing:
        way = way.but(CHECKPOINTING, checkpointing=True)
        yield way
    if way.setup.keep_layers:
        way = way.but("--keep_layers 0", keep_layers=0)
        yield way
    if on_gpu and not way.setup.offload:
        yield way.but(OFFLOAD, offload=True)


def _places(way: _Way, on_gpu: bool) -> Iterator[_Way]:
    yield way
    setup = way.setup
    if not (on_gpu and setup.in_backward and setup.gpus == 1):
        return
    if not setup.host_states:
        way = way.but(STATES_ON_HOST, host_states=True)
        yield way
    if not setup.host_weights and setup.checkpointing and not setup.keep_layers:
        yield way.but(WEIGHTS_ON_HOST, host_weights=True)


def _all_weights(way: _Way, on_gpu: bool) -> Iterator[_Way]:
    for optimizer in _optimizers(way):
        for activations in _activations(optimizer, on_gpu):
            yield from _places(activations, on_gpu)


def _adapters(setup: Setup, on_gpu: bool) -> Iterator[list[_Way]]:
    """Ways in which less is trained, or in 4 bits, each only where the one before does not fit."""
    way = _Way(setup)
    if setup.lora_rank is None:
        adapter = replace(setup, lora_rank=16, host_states=False, host_weights=False,
                          weights="bf16" if on_gpu else setup.weights,
                          states="fp32" if setup.states == "bf16" else setup.states)  # fmt: skip
        present = {"--weight_precision auto": on_gpu and setup.weights == "fp32",
                   "--optimizer_states device": setup.host_states, "--weights device": setup.host_weights,
                   CHECKPOINTING: setup.host_weights}  # which switches it on
        way = _Way(adapter, ("--use_peft true", *(flag for flag, needed in present.items() if needed)))
        yield list(_activations(way, on_gpu))
    if not setup.quantised and on_gpu:
        yield list(_activations(way.but("--load_in_4bit true", quantised=True), on_gpu))


def shorter_rows(row: Row) -> Iterator[Row]:
    """The row, its half, its quarter, ... of at least 1024 tokens."""
    yield row
    while row.tokens >= 2 * _LEAST_TOKENS:
        row = replace(
            row, tokens=row.tokens // 2, label_tokens=row.label_tokens // 2, kv_tokens=row.kv_tokens // 2
        )
        yield row


def cheapest_change(
    config: PretrainedConfig, row: Row, setup: Setup, fits: Callable[[Estimate], bool], gpu: Gpu | None
) -> Change | None:
    """The change with which a run fits that costs least, if there is one.

    What is trained weighs most, then the pairs of a step, then the row's length; then speed, the copies from and to the
    host included and updates left out, which fewer bits make shorter; then pinned memory, the bits of weights and
    states, and how many options it takes.

    Args:
        fits: whether an estimate fits. gpu: that computes, of an unknown one the H100's figures; None: a CPU, where
            nothing lies on another side.
    """
    on_gpu, speed = gpu is not None, gpu or GPUS["h100"]
    if not speed.flops:
        speed = replace(GPUS["h100"], memory=speed.memory)
    rows = list(shorter_rows(row))

    def of(way: _Way, row: Row) -> Estimate:
        # A step of shorter rows has several, whose gradients are added up where they are not used at once.
        adds = way.setup.accumulates or (row is not rows[0] and not way.setup.in_backward)
        return estimate(config, row, replace(way.setup, accumulates=adds))

    def seconds(prediction: Estimate, row: Row) -> tuple[float, float]:
        """Of a token: (all, without the update)"""
        time = time_of(prediction, speed)
        return time.total / row.tokens, (time.total - time.update) / row.tokens

    now = seconds(estimate(config, row, setup), row)

    def best(ways: list[_Way], row: Row, fewer_pairs: bool = False) -> Change | None:
        found = []
        for way in ways:
            prediction = of(way, row)
            if fits(prediction):
                slower, ranked = (there / here - 1 for there, here in zip(seconds(prediction, row), now, strict=True))
                shorter = [] if row is rows[0] else [f"--tokens_per_micro_batch {row.tokens}"]
                rank = (round(ranked / _ALIKE), bool(prediction.pinned), way.coarser, len(way.flags))
                found.append((rank, Change(" ".join([*way.flags, *shorter]), prediction, slower, fewer_pairs)))
        return min(found, key=lambda each: each[0])[1] if found else None

    ways = list(_all_weights(_Way(setup), on_gpu) if setup.lora_rank is None else _activations(_Way(setup), on_gpu))
    ways = [way for way in ways if fits(of(way, rows[-1]))]  # what does not fit there fits nowhere
    for fewer_pairs in (False, True):
        for each in rows:
            several = setup.accumulates or each is not rows[0]
            alike = [way for way in ways if (way.setup.in_backward and several) == fewer_pairs]
            if change := best(alike, each, fewer_pairs):
                return change
    for adapters in _adapters(setup, on_gpu):
        if change := best(adapters, row):
            return change
    return None

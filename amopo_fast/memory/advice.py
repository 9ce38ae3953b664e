"""Which ways to train fit into a GPU, and what to change when one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from transformers import PretrainedConfig

from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate

OPTIMIZERS: dict[str, tuple[Setup, str]] = {
    "AdamW, fp32 weights": (Setup(weights="fp32"), "--weight_precision fp32"),
    "fp32, in backward": (
        Setup(weights="fp32", in_backward=True), "--weight_precision fp32 --optim_in_backward adamw"),
    "AdamW, bf16 weights": (Setup(), "--weight_precision bf16_stochastic"),
    "AdamW 8-bit, bf16": (Setup(states="8bit"), "--weight_precision bf16_stochastic --optim adamw_torch_8bit"),
    "8-bit, in backward": (
        Setup(states="8bit", in_backward=True), "--weight_precision bf16_stochastic --optim_in_backward adamw_8bit"),
    "4-bit, in backward": (
        Setup(states="4bit", in_backward=True), "--weight_precision bf16_stochastic --optim_in_backward adamw_4bit"),
    "8-bit on the host": (
        Setup(states="8bit", in_backward=True, host_states=True),
        "--weight_precision bf16_stochastic --optim_in_backward adamw_8bit --optimizer_states host"),
    "4-bit on the host": (
        Setup(states="4bit", in_backward=True, host_states=True),
        "--weight_precision bf16_stochastic --optim_in_backward adamw_4bit --optimizer_states host"),
    "LoRA, rank 16": (Setup(lora_rank=16), "--use_peft true"),
    "QLoRA, rank 16": (Setup(lora_rank=16, quantised=True), "--use_peft true --load_in_4bit true"),
}  # fmt: skip


def remedies(setup: Setup, row: Row) -> Iterator[tuple[str, Setup, Row]]:
    """(flags, setup, row) that need less and less memory, in the order in which a user would give things up."""
    flags = ""

    def changed(new: str, **changes) -> tuple[str, Setup, Row]:
        nonlocal setup, flags
        setup = dataclasses.replace(setup, **changes)
        flags = f"{flags} {new}".strip()
        return flags, setup, row

    if not setup.checkpointing:
        yield changed("--gradient_checkpointing true", checkpointing=True)
    if setup.lora_rank is None:
        if setup.weights == "fp32":
            yield changed("--weight_precision bf16_stochastic", weights="bf16")
        if setup.states == "fp32" and setup.gpus == 1:
            flags_before = flags
            yield changed("--optim_in_backward adamw_8bit", states="8bit", in_backward=True, accumulates=False)
            flags = flags_before
        if setup.states != "4bit" and setup.gpus == 1:
            yield changed("--optim_in_backward adamw_4bit", states="4bit", in_backward=True, accumulates=False)
        if setup.gpus == 1 and setup.in_backward and not setup.host_states:
            yield changed("--optimizer_states host", host_states=True)
    if setup.keep_layers:
        yield changed("--keep_layers 0", keep_layers=0)
    if not setup.offload:
        yield changed("""--gradient_checkpointing_kwargs '{"offload": true}'""", offload=True)
    if row.tokens > 2048:
        half = dataclasses.replace(
            row, tokens=row.tokens // 2, label_tokens=row.label_tokens // 2, kv_tokens=row.kv_tokens // 2
        )
        yield f"{flags} --tokens_per_micro_batch {half.tokens} (and fewer pairs_per_step)".strip(), setup, half
    if setup.lora_rank is None:
        adapter = Setup(checkpointing=True, lora_rank=16, gpus=setup.gpus)
        yield "--use_peft true --gradient_checkpointing true", adapter, row
        quantised = dataclasses.replace(adapter, quantised=True)
        yield "--use_peft true --load_in_4bit true --gradient_checkpointing true", quantised, row
    elif not setup.quantised:
        yield changed("--load_in_4bit true", quantised=True)


def first_remedy(config: PretrainedConfig, row: Row, setup: Setup, memory: int) -> tuple[str, Estimate] | None:
    """The least change that fits into `memory` bytes, if one does."""
    for flags, other, smaller in remedies(setup, row):
        prediction = estimate(config, smaller, other)
        if prediction.needed <= memory:
            return flags, prediction
    return None

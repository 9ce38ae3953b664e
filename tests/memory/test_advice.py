"""Which change is advised, what a step's copies cost, and the cards."""

import dataclasses

import pytest
import torch
from transformers import Qwen2Config

from amopo_fast.memory.advice import CHECKPOINTING, cheapest_change
from amopo_fast.memory.estimate import HOST_PROCESS, Row, Setup, estimate
from amopo_fast.memory.gpus import GIB, GPUS, Gpu, known_peak, measure_copies, parse_gpu
from amopo_fast.memory.preflight import DoesNotFit, Room, copies_line, longest_that_fits, require_fit, row_that_fits
from amopo_fast.memory.speed import UPDATE, copied, time_of, tokens_per_second

QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                       num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
STEP = Row(tokens=8192, label_tokens=4096, kv_tokens=16384)
SHORT = Row(tokens=1024, label_tokens=512, kv_tokens=2048)
FOUR = Setup(states="4bit", in_backward=True)


def advised(setup, gpu, host=None, row=STEP):
    room = Room(GPUS[gpu] if gpu else None, host)
    change = cheapest_change(QWEN_32B, row, setup, room.fits, room.gpu)
    assert change is None or room.fits(change.prediction)
    return change and change.flags


def test_what_stays_on_the_gpu_is_advised_first():
    flags = advised(Setup(weights="fp32"), "h200", row=SHORT)
    assert "--optim_in_backward adamw_8bit" in flags and "host" not in flags
    # 4 bits with every activation kept are faster than 8 with layers computed again.
    flags = advised(Setup(weights="fp32", checkpointing=False), "h200", row=SHORT)
    assert "adamw_4bit" in flags and "gradient_checkpointing" not in flags


def test_the_cheapest_change_that_fits_is_named():
    whole = Setup(weights="fp32")
    assert advised(whole, "h100").endswith("--optim_in_backward adamw_8bit --optimizer_states host")
    # 62 GiB of states do not fit into 60 of the host; half of them do.
    assert advised(whole, "h100", 60 * GIB).endswith("--optim_in_backward adamw_4bit --optimizer_states host")
    flags = advised(whole, "4090", 128 * GIB)
    assert "--optimizer_states host --weights host" in flags and "tokens_per_micro_batch" not in flags


def test_an_adapter_is_advised_where_all_weights_find_no_place():
    assert advised(Setup(weights="fp32"), "l40s", 16 * GIB, SHORT).startswith("--use_peft true --weight_precision auto")
    # What the run has on the host goes with no adapter, and had switched checkpointing on.
    flags = advised(dataclasses.replace(FOUR, host_states=True, host_weights=True), "l40s", 16 * GIB, SHORT)
    assert flags.startswith(f"--use_peft true --optimizer_states device --weights device {CHECKPOINTING}")
    assert "--load_in_4bit true" in advised(Setup(lora_rank=16), "l40s", row=SHORT)


def test_shorter_rows_are_advised_before_less_is_trained():
    long = Row(tokens=65536, label_tokens=32768, kv_tokens=131072)
    flags = advised(FOUR, "4090", 128 * GIB, long)
    assert "--weights host" in flags and "--tokens_per_micro_batch" in flags and "use_peft" not in flags


def test_a_step_in_the_backward_pass_is_one_micro_batch():
    """So one that had several needs fewer pairs, which is said; a shorter row, whose gradients add up, needs none."""
    small = Qwen2Config(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
                        num_attention_heads=4, tie_word_embeddings=False)  # fmt: skip
    row, after = Row(2048, 1024, 4096), Setup(weights="fp32")

    def change(setup, size):
        return cheapest_change(small, row, setup, lambda prediction: prediction.peak < size, GPUS["h100"])

    def peak(row, **changes):
        return estimate(small, row, dataclasses.replace(after, **changes)).peak

    half = Row(1024, 512, 2048)
    assert peak(half, accumulates=True) < peak(row)
    found = change(dataclasses.replace(after, accumulates=True), peak(half, weights="bf16", accumulates=True) + 1)
    assert not found.fewer_pairs and found.flags == "--weight_precision bf16_stochastic --tokens_per_micro_batch 1024"
    for accumulates in (False, True):
        found = change(dataclasses.replace(after, accumulates=accumulates), peak(row, weights="bf16", states="8bit",
                                                                                 in_backward=True) + 1)  # fmt: skip
        assert "optim_in_backward" in found.flags and found.fewer_pairs == accumulates
        assert ("lower pairs_per_step" in str(found)) == accumulates


def test_what_does_not_fit_into_the_host_is_refused_with_its_numbers():
    setup = dataclasses.replace(FOUR, host_states=True)
    with pytest.raises(DoesNotFit, match=r"pins 32.4 GiB of host memory .* 16.0 GiB are free there"):
        require_fit("qwen", QWEN_32B, SHORT, setup, Room(GPUS["h100"], 16 * GIB))
    prediction = estimate(QWEN_32B, SHORT, setup)
    require_fit("qwen", QWEN_32B, SHORT, setup, Room(GPUS["h100"], prediction.host_pinned + HOST_PROCESS))
    with pytest.raises(DoesNotFit):
        require_fit("qwen", QWEN_32B, SHORT, setup, Room(GPUS["h100"], prediction.host_pinned + HOST_PROCESS - 1))
    # On a CPU all of it is one memory, and there is nothing to move.
    with pytest.raises(DoesNotFit, match=r"needs about .* GiB of memory .* 8.0 GiB are free; .*more memory"):
        require_fit("qwen", QWEN_32B, Row(64, 32, 128), dataclasses.replace(FOUR, autocast=False), Room(None, 8 * GIB))


def test_a_default_row_is_halved_until_it_fits():
    asked = []

    def fits(limit):
        return lambda tokens: asked.append(tokens) or tokens <= limit

    assert row_that_fits(8192, fits(2500)) == 2048 and asked == [8192, 4096, 2048]
    assert row_that_fits(8192, fits(9000)) == 8192
    assert row_that_fits(8192, fits(0)) == 512 and row_that_fits(300, fits(0)) == 300
    assert longest_that_fits(SHORT, lambda row: row.tokens <= 5000) == 4096
    assert longest_that_fits(SHORT, lambda row: False) == 1024 and longest_that_fits(SHORT, lambda row: True) == 2**16


def test_copies_hide_or_are_counted():
    states = estimate(QWEN_32B, STEP, dataclasses.replace(FOUR, host_states=True))
    both = estimate(QWEN_32B, STEP, dataclasses.replace(FOUR, host_states=True, host_weights=True))
    plain, host = time_of(estimate(QWEN_32B, STEP, FOUR), GPUS["h100"]), time_of(states, GPUS["h100"])
    assert plain.exposed == 0 and host.hides and host.exposed < 0.02 * host.compute
    assert host.to_device == pytest.approx(32.4 * GIB / 50e9, rel=0.01)
    # In each pass all layers but those in slots, of which this card holds more than two; states once.
    layer = both.pinned["weights"] / 64
    slots = both.slots_on(GPUS["h100"].memory)
    there, back = copied(both, GPUS["h100"])
    assert 40 < slots < 64
    assert there == pytest.approx(2 * (64 - slots) * layer + both.pinned["optimizer states"], rel=1e-3)
    assert back == pytest.approx(2 * (64 - slots) * layer + both.pinned["optimizer states"], rel=1e-3)
    # Two slots, where a layer waits for the other's write-back, lose a tenth, and more of them do not.
    two = dataclasses.replace(GPUS["h100"], memory=16 * GIB)
    assert both.slots_on(two.memory) == 2 and not time_of(both, two).hides and time_of(both, GPUS["h100"]).hides
    assert copied(both, two)[1] == pytest.approx(both.host_pinned, rel=1e-3)
    slow = dataclasses.replace(GPUS["h100"], to_device=5e9, to_host=5e9)
    found = time_of(both, slow)
    assert not found.hides
    # No pass is shorter than its own copies.
    assert found.total > copied(both, slow)[0] / 5e9
    assert tokens_per_second(both, STEP, slow) == pytest.approx(8192 / found.total)
    assert "assumed 50 and 50 GB/s" in copies_line(both, GPUS["h100"])
    assert "which hides behind" in copies_line(states, GPUS["h100"])
    assert "do not hide behind" in copies_line(both, slow)
    assert copies_line(estimate(QWEN_32B, STEP, FOUR), slow) == ""


def test_a_device_copies_at_a_measured_rate():
    there, back = measure_copies(torch.device("cpu"), seconds=0.01, size=2**16)
    assert 1e6 < there < 1e13 and 1e6 < back < 1e13


def test_gpus_by_name_and_by_size():
    assert parse_gpu("H200").memory == 139 * GIB and parse_gpu("24GiB").memory == parse_gpu("24").memory == 24 * GIB
    assert {"4090", "5090", "l40s", "a100-80", "h100", "h200", "b200"} <= GPUS.keys()
    assert all(23 * GIB < gpu.memory < 192 * GIB and 1e14 < gpu.flops < 3e15 for gpu in GPUS.values())
    with pytest.raises(ValueError, match="--gpu h300: give GiB"):
        parse_gpu("h300")
    assert parse_gpu("4090").name == "4090"  # the card, and not that many GiB
    for name, flops in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", 0.0)):
        assert known_peak(name) == flops
    prediction = estimate(QWEN_32B, STEP, Setup())
    assert tokens_per_second(prediction, STEP, parse_gpu("24")) == 0.0
    assert time_of(prediction, Gpu("x", GIB, 0.0, 1.0, 1.0)) is None
    seconds = prediction.flops / (989e12 * 0.5) + prediction.trained * UPDATE["fp32"]
    assert tokens_per_second(prediction, STEP, GPUS["h200"], 2, 0.5) == pytest.approx(2 * 8192 / seconds)

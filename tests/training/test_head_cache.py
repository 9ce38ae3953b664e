"""How much the head keeps: `logits_cache_gib`, its choice from the GPU's memory, and a resume that repeats it."""

import dataclasses
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from amopo_fast import AMoPOConfig
from amopo_fast.errors import OptionError
from amopo_fast.memory.estimate import Row, Setup, cache_bytes, estimate
from amopo_fast.memory.gpus import GIB
from amopo_fast.models.check import prepare_model
from amopo_fast.packing.schedule import Epoch
from amopo_fast.training import head_cache
from amopo_fast.training.head_cache import HeadCache, bytes_that_fit

CONFIG = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=1,
                     num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
ROW = Row(tokens=8192, label_tokens=4096, kv_tokens=16384)


def test_the_largest_share_that_fits_and_the_same_for_every_byte_of_a_gibibyte():
    setup = Setup(states="8bit")
    whole = cache_bytes(CONFIG, ROW)
    assert whole == 2 * 4096 * 152064
    chosen = [bytes_that_fit(CONFIG, ROW, setup, memory * GIB) for memory in range(8, 40)]
    assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == -(-whole // 2**20) * 2**20
    assert 1 < len(set(chosen)) <= 5
    for memory, size in zip(range(8, 40), chosen, strict=True):
        assert size == bytes_that_fit(CONFIG, ROW, setup, memory * GIB + GIB - 1)
        if size:
            needed = estimate(CONFIG, ROW, dataclasses.replace(setup, head_cache=size)).needed
            assert needed <= 0.95 * memory * GIB


def test_the_estimate_counts_what_is_kept_of_a_trained_head():
    def at_head(setup):
        found = estimate(CONFIG, ROW, setup)
        return found.peak if found.moment == "backward pass of the head" else None

    kept = [at_head(Setup(states="8bit", in_backward=True, head_cache=size)) for size in (2 * GIB, 4 * GIB)]
    assert kept[0] is not None and kept[0] == kept[1]  # never more than all of it, 1.16 GiB
    before = estimate(CONFIG, ROW, Setup(states="8bit", in_backward=True)).peak
    assert 0 < kept[0] - before <= cache_bytes(CONFIG, ROW)
    frozen = [estimate(CONFIG, ROW, Setup(lora_rank=8, head_cache=size)).peak for size in (0, 4 * GIB)]
    assert frozen[0] == frozen[1]


@pytest.mark.parametrize("text, size", [("auto", None), ("1.5", 3 * 2**29), (0, 0), (0.25, 2**28)])
def test_what_may_be_written(text, size, tmp_path):
    with mock.patch("amopo_fast.training.config.try_names"):
        assert AMoPOConfig(str(tmp_path), logits_cache_gib=text, use_cpu=True).logits_cache_bytes == size


@pytest.mark.parametrize("text", ["nan", "-1", "some", "1e9", None])
def test_what_may_not(text, tmp_path):
    with pytest.raises(OptionError, match="logits_cache_gib=.*write auto, or GiB"):
        AMoPOConfig(str(tmp_path), logits_cache_gib=text, use_cpu=True)


class _Arguments:
    """Of a run on a GPU."""

    device, deepspeed, world_size, bf16, fp16, kernel_backend = torch.device("cuda"), None, 1, True, False, "fused"

    def __init__(self, asked=None):
        self.logits_cache_bytes = asked


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    prepare_model(model)
    return model


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 20 GiB, and the row and setup of CONFIG."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (18 * GIB + 5, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(head_cache, "choose_backend", lambda name, like, dtype: name)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(head_cache, "run_of", lambda *a: (ROW, Setup(states="8bit")))
    monkeypatch.setattr(head_cache, "bytes_that_fit", lambda config, row, setup, memory: memory // 100)


def test_a_run_chooses_once_and_a_resume_repeats_it(model, gpu, caplog):
    cache = HeadCache(_Arguments())
    assert "chosen from 20 GiB" in cache.choose(model, [], Epoch([], 1)) and cache.bytes == (20 * GIB + 5) // 100
    saved = cache.state_dict()
    with mock.patch.object(head_cache, "bytes_that_fit", lambda *a: 7):  # another GPU
        other = HeadCache(_Arguments())
        other.choose(model, [], Epoch([], 1))
    assert other.bytes == 7
    other.load_state_dict(other.combine_states([saved, saved], 1))
    assert other.bytes == cache.bytes and "as the checkpoint has it" in caplog.text


def test_nothing_is_chosen_where_a_number_is_given_or_nothing_can_be_kept(model, gpu):
    asked = HeadCache(_Arguments(3 * GIB))
    assert asked.choose(model, [], Epoch([], 1)) == "" and asked.bytes == 3 * GIB
    asked.load_state_dict({"bytes": 5})
    assert asked.bytes == 3 * GIB
    for name, value in (("device", torch.device("cpu")), ("kernel_backend", "torch"), ("deepspeed", "zero.json")):
        arguments = _Arguments()
        setattr(arguments, name, value)
        cache = HeadCache(arguments)
        assert cache.choose(model, [], Epoch([], 1)) == ""
        cache.load_state_dict({"bytes": 5})
        assert cache.bytes == 0
    model.lm_head.weight.requires_grad_(False)
    cache = HeadCache(_Arguments())
    assert cache.choose(model, [], Epoch([], 1)) == "" and cache.bytes == 0
    model.lm_head.weight.requires_grad_(True)
    with mock.patch.object(head_cache, "bytes_that_fit", side_effect=TypeError("no such model")):
        cache = HeadCache(_Arguments())
        assert "0.00" in cache.choose(model, [], Epoch([], 1)) and cache.bytes == 0

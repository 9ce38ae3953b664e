"""The types that people train most: each is tried in miniature, and shares its prefixes."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from amopo_fast.models import attention, attention_backends  # noqa: E402
from amopo_fast.models.architecture import attention_needs  # noqa: E402
from amopo_fast.models.attention_backends import choose_backend  # noqa: E402
from amopo_fast.models.check import choose_layout  # noqa: E402
from amopo_fast.packing.plan import Layout  # noqa: E402
from model_types import empty_model  # noqa: E402

SHARED = (
    "llama mistral mixtral ministral3 qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma4_text "
    "gemma3n_text phi phi3 phimoe gpt2 gpt_neox gpt_bigcode gptj opt olmo olmo2 olmo3 olmoe granite granitemoe "
    "cohere cohere2 deepseek_v3 glm4 glm4_moe gpt_oss smollm3 starcoder2 llama4_text exaone4 ernie4_5"
).split()
STATES = "qwen3_next qwen3_5_text granitemoehybrid nemotron_h falcon_h1 lfm2 bamba".split()


# What "auto" picks on sm_90 in bfloat16, without flash-attn and with version 2, where it is not varlen and that.
BACKENDS = {
    "deepseek_v3": ("varlen", "flash_attention_2"),  # 192 wide
    "gemma2": ("sdpa", "flash_attention_2"),  # a softcap
    "gemma3n_text": ("varlen", "flash_attention_2"),
    "gemma4_text": ("sdpa", "sdpa"),  # 512 wide
    "glm4_moe": ("sdpa", "sdpa"),  # 42 wide by default; 128 as published
    "gpt2": ("sdpa", "flash_attention_2"),  # attention dropout
    "gpt_bigcode": ("sdpa", "flash_attention_2"),
    "gpt_oss": ("sdpa", "sdpa"),  # sinks
    "opt": ("varlen", "flash_attention_2"),
}


@pytest.fixture
def used(monkeypatch):
    """What the layers ask of attention while the trial runs."""
    seen, original = set(), attention.attend

    def attend(*args, **options):
        seen.update(name for name in ("window", "softcap", "sinks") if options.get(name) is not None)
        return original(*args, **options)

    monkeypatch.setattr(attention, "attend", attend)
    return seen


@pytest.mark.parametrize("name", SHARED + STATES)
def test_prefixes_are_shared_and_the_backend_has_what_the_layers_ask(name, used, monkeypatch):
    model = empty_model("causal", name)
    choice = choose_layout(model)
    if name in ("gptj", "lfm2") and Version(transformers.__version__) < Version("5.24"):
        # Their layers did not hand keywords on in 5.17; the versions between were not tried.
        assert choice.layout is not Layout.SEPARATE or re.search("did not get the row|takes no packed", choice.reason)
    else:
        assert choice.layout is (Layout.STATES if name in STATES else Layout.SHARED)
    needs = attention_needs(model, torch.device("cpu"))
    assert used <= {option for option in ("window", "softcap", "sinks") if getattr(needs, option)}
    assert choose_backend("auto", needs) == "sdpa"
    found = []
    for installed in (("varlen", "sdpa"), ("flash_attention_2", "varlen", "sdpa")):
        monkeypatch.setattr(attention_backends, "_installed", installed.__contains__)
        choose_backend.cache_clear()
        found.append(choose_backend("auto", replace(needs, device="cuda", capability=(9, 0), dtype=torch.bfloat16)))
    choose_backend.cache_clear()
    assert tuple(found) == BACKENDS.get(name, ("varlen", "flash_attention_2"))

"""The types that people train most: each is tried in miniature, and shares its prefixes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from amopo_fast.models.check import choose_layout  # noqa: E402
from amopo_fast.packing.plan import Layout  # noqa: E402
from model_types import empty_model  # noqa: E402

SHARED = (
    "llama mistral mixtral ministral3 qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma4_text "
    "gemma3n_text phi phi3 phimoe gpt2 gpt_neox gpt_bigcode gptj opt olmo olmo2 olmo3 olmoe granite granitemoe "
    "cohere cohere2 deepseek_v3 glm4 glm4_moe gpt_oss smollm3 starcoder2 llama4_text exaone4 ernie4_5"
).split()
STATES = "qwen3_next qwen3_5_text granitemoehybrid nemotron_h falcon_h1 lfm2 bamba".split()


@pytest.mark.parametrize("name", SHARED + STATES)
def test_prefixes_are_shared(name):
    expected = Layout.STATES if name in STATES else Layout.SHARED
    assert choose_layout(empty_model("causal", name)).layout is expected

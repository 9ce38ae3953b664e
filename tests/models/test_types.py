"""The types that people train most are tried in miniature, share their prefixes and have an attention backend; every
type that the sweep accepted, as `slow`."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from amopo_fast.models import attention, attention_backends  # noqa: E402
from amopo_fast.models.architecture import attention_needs, language_model_of  # noqa: E402
from amopo_fast.models.attention_backends import choose_backend  # noqa: E402
from amopo_fast.models.check import choose_layout  # noqa: E402
from amopo_fast.packing.plan import Layout  # noqa: E402
from model_types import PACKAGES, empty_model  # noqa: E402

SHARED = (
    "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text gemma4_text gemma3n_text phi3 gpt2 gpt_neox opt "
    "olmo2 olmo3 granite cohere2 deepseek_v3 glm4_moe gpt_oss smollm3 llama4_text exaone4"
).split()
STATES = "qwen3_next qwen3_5_text granitemoehybrid nemotron_h falcon_h1 lfm2 bamba".split()


SWEEP = json.loads((BENCHMARKS / "results" / "models.json").read_text(encoding="utf-8"))["rows"]
LAYOUTS = {(row["kind"], row["case"]): row["layout"] for row in SWEEP if "error" in row}
TYPES = [("causal", name) for name in SHARED + STATES]
OTHERS = [case for case in LAYOUTS if case not in TYPES]

# What "auto" picks on sm_90 in bfloat16, without flash-attn and with version 2, where it is not varlen and that:
# varlen has no softcap and no attention dropout,
ONLY_FLASH = (
    "gemma2 vaultgemma "
    "bert bert-generation big_bird biogpt camembert data2vec-text electra emu3 ernie git gpt-sw3 gpt2 gpt_bigcode "
    "gpt_neox_japanese kosmos-2 megatron-bert openai-gpt plbart roberta roberta-prelayernorm roc_bert roformer "
    "seed_oss xglm xlm xlm-roberta xlm-roberta-xl xmod"
).split()
# and neither has heads wider than 256, of a width that 8 does not divide (GLM-4-MoE by default; published ones are
# 128 wide), or sinks.
NEITHER = (
    "gemma4 gemma4_text gemma4_unified gemma4_unified_text xlstm zamba glm4_moe "
    "deepseek_v4 flint gpt_oss granite_swa granitemoe_swa hy_v4 hy_v4_vl inkling2 inkling2_loop inkling2_loop_text "
    "inkling2_text mimo_v2_flash"
).split()


# What no loss of text leads to in a causal type. Anything else would be a size of its configuration that the trial's
# sequences do not cross, and that is frozen for it.
NO_GRADIENT = (
    r"indexer\.|encoder_attn|cross_attn|\bpooler\.|visual|vision|image|audio|multi_modal|protein|\.adapter\."
)


@pytest.fixture
def used(monkeypatch):
    """What the layers ask of attention while the trial runs."""
    seen, original = set(), attention.attend

    def attend(*args, **options):
        seen.update(name for name in ("window", "softcap", "sinks") if options.get(name) is not None)
        return original(*args, **options)

    monkeypatch.setattr(attention, "attend", attend)
    return seen


@pytest.mark.parametrize("kind, name", [*TYPES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_the_layout_is_exact_and_the_backend_has_what_the_layers_ask(kind, name, used, monkeypatch):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="transformers builds it with that package")
    model = language_model_of(empty_model(kind, name))
    choice = choose_layout(model)
    if name in ("gptj", "lfm2") and Version(transformers.__version__) < Version("5.24"):
        # Their layers did not hand keywords on in 5.17; the versions between were not tried.
        assert choice.layout is not Layout.SEPARATE or re.search("did not get the row|takes no packed", choice.reason)
    elif (kind, name) in TYPES:
        assert choice.layout is (Layout.STATES if name in STATES else Layout.SHARED)
    else:
        assert choice.layout.value == LAYOUTS[kind, name]
    if kind == "causal":
        assert not [place for place in choice.unreached if not re.search(NO_GRADIENT, place)], choice.unreached
    needs = attention_needs(model, torch.device("cpu"))
    if choice.layout is not Layout.SEPARATE:
        assert used <= {option for option in ("window", "softcap", "sinks") if getattr(needs, option)}
    assert choose_backend("auto", needs) == "sdpa"
    found = []
    for installed in (("varlen", "sdpa"), ("flash_attention_2", "varlen", "sdpa")):
        monkeypatch.setattr(attention_backends, "_installed", installed.__contains__)
        choose_backend.cache_clear()
        found.append(choose_backend("auto", replace(needs, device="cuda", capability=(9, 0), dtype=torch.bfloat16)))
    choose_backend.cache_clear()
    assert found == ["sdpa" if name in ONLY_FLASH + NEITHER else "varlen",
                     "sdpa" if name in NEITHER else "flash_attention_2"]  # fmt: skip

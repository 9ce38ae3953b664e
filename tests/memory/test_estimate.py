"""The estimate against real models, a real step's measured memory, and the arithmetic of the 32B table."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from amopo_fast.memory.advice import OPTIMIZERS
from amopo_fast.memory.estimate import HOST_PROCESS, Row, Setup, estimate
from amopo_fast.memory.gpus import GIB, GPUS
from amopo_fast.memory.parameters import parameters_of
from amopo_fast.memory.profile import LiveBytes, _run, meta_model, profile_body
from amopo_fast.models.architecture import language_model_of
from amopo_fast.models.check import prepare_model
from amopo_fast.models.depth import set_layers
from amopo_fast.models.miniature import tiny_config
from amopo_fast.models.scoring import score
from amopo_fast.models.streaming import stream_weights
from amopo_fast.optim import AdamW
from amopo_fast.optim.host_states import blocks_of, parcel_bytes
from amopo_fast.optim.states import moment_bytes
from amopo_fast.packing.plan import build_plan
from amopo_fast.prompts.tokens import PairTokens

SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
TWO_LAYERS = SMALL | {"num_hidden_layers": 2}  # are profiled at once, others twice
QWEN_32B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                       num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
QWEN_14B = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
                       num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
STEP = Row(tokens=8192, label_tokens=4096, kv_tokens=16384)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**TWO_LAYERS),
        Qwen2Config(**TWO_LAYERS, tie_word_embeddings=True),
        Qwen3Config(**TWO_LAYERS, head_dim=32),
        LlamaConfig(**TWO_LAYERS),
        MistralConfig(**TWO_LAYERS, head_dim=16),
        GemmaConfig(**TWO_LAYERS, head_dim=16),
    ],
    ids=lambda config: f"{config.model_type}-{'tied' if config.tie_word_embeddings else 'untied'}",
)
def test_parameters_are_those_of_the_real_model(config):
    model = AutoModelForCausalLM.from_config(config)
    real = sum(p.numel() for p in model.parameters())
    assert sum(p.numel for p in parameters_of(config)) == real
    prediction = estimate(config, Row(64, 32, 64), Setup(weights="fp32"))
    assert prediction.parameters == prediction.trained == real
    assert prediction.parts["weights"] == 4 * real


def test_an_adapters_parameters_are_those_of_the_real_one():
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**TWO_LAYERS)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    prediction = estimate(config, Row(64, 32, 64), Setup(lora_rank=16))
    trained, total = model.get_nb_trainable_parameters()
    assert (prediction.trained, prediction.parameters) == (trained, total)
    assert prediction.parts["weights"] == 2 * (total - trained) + 4 * trained


def measured_peak(config, plan, setup):
    """Peak of the tensors' bytes over two real steps on the CPU, states made, those of the host's buffers included."""
    dtype = torch.float32 if setup.weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    prepare_model(model)
    if setup.checkpointing:
        model.gradient_checkpointing_enable()
    with LiveBytes() as live:
        streamed = stream_weights(model, torch.device("cpu")) if setup.host_weights else None
        live.include(model.parameters())
        optimizer = AdamW(model.parameters(), states=setup.states, in_backward=setup.in_backward,
                          host_blocks=blocks_of(model) if setup.host_states else ())  # fmt: skip
        for _ in range(2):
            if streamed:
                streamed.settle()
            live.peak = live.live
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                stats = score(model, plan, backend="torch")
            stats.logp_sum.sum().backward()
            del stats
            optimizer.step()
            optimizer.zero_grad()
    # Each weight that travels is a storage of its own over its layer's block, or slot, and has been counted twice.
    twice = streamed.nbytes + sum(slot.memory.nbytes for slot in streamed._vacant) if streamed else 0
    return live.peak - twice


def real_step():
    rng = np.random.default_rng(0)
    pairs = []
    for record in range(6):
        user = rng.integers(0, 512, 60)
        prompts = tuple(np.concatenate([[k] * 20, user]) for k in range(2))
        pairs.append(PairTokens(record, prompts, rng.integers(0, 512, 40), rng.integers(0, 512, 50), False))
    plan = build_plan(pairs)
    return plan, Row(plan.num_tokens, plan.labels.shape[0], plan.paths.kv_indices.shape[0], 130)


SETUPS = {
    f"{'tied' if tied else 'untied'}, {'in backward' if inside else 'after'}, {'recomputed' if again else 'kept'}":
        (tied, Setup(weights="fp32", in_backward=inside, checkpointing=again))
    for tied in (True, False) for inside in (True, False) for again in (True, False)
}  # fmt: skip
IN_CI = {"tied, in backward, recomputed", "tied, after, kept", "untied, in backward, kept", "untied, after, recomputed"}
_8BIT = Setup(states="8bit", in_backward=True)
SETUPS |= {
    "8-bit": (False, _8BIT),
    "8-bit on the host": (False, dataclasses.replace(_8BIT, host_states=True)),
    "weights on the host": (False, dataclasses.replace(_8BIT, host_weights=True)),
    "4-bit, both on the host": (True, dataclasses.replace(_8BIT, states="4bit", host_states=True, host_weights=True)),
}
IN_CI |= {"4-bit, both on the host"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_CI else pytest.mark.slow) for name in SETUPS]
)
def test_within_five_percent_of_a_real_step(name):
    """What lies on the host is beside the GPU's part there, and both are a CPU's memory here."""
    tied, setup = SETUPS[name]
    plan, row = real_step()
    config = Qwen2Config(vocab_size=512, hidden_size=160, intermediate_size=320, num_hidden_layers=5,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    prediction = estimate(config, row, setup)
    assert prediction.peak + prediction.host_pinned == pytest.approx(measured_peak(config, plan, setup), rel=0.05)


@pytest.mark.parametrize(
    "checkpointing, dtype",
    [
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
        (False, torch.bfloat16),
        (True, torch.float32),
    ],
)  # fmt: skip
def test_the_line_through_two_depths_goes_through_a_third(checkpointing, dtype):
    def seven_layers():
        config = copy.deepcopy(QWEN_32B)
        set_layers(config, 7)
        return config

    profile = profile_body(seven_layers(), tokens=256, kv_tokens=512, dtype=dtype, checkpointing=checkpointing)
    seven = meta_model(seven_layers(), dtype).train()
    kept, forward, backward, *flops = _run(seven, (1, 256), 512, checkpointing, liger=False, autocast=True)
    assert (profile.kept, profile.forward, profile.backward, profile.flops, profile.forward_flops) == (
        kept, forward - kept, backward - kept, *flops)  # fmt: skip


def test_the_32b_table():
    """Sizes that follow from the shape alone: 32.76e9 parameters, bfloat16, states, 64 checkpoints of 80 MiB."""
    four = estimate(QWEN_32B, STEP, OPTIMIZERS["4-bit, in backward"][0])
    eight = estimate(QWEN_32B, STEP, OPTIMIZERS["8-bit, in backward"][0])
    assert four.parameters == 32_763_876_352
    assert four.parts["weights"] / GIB == pytest.approx(61.0, abs=0.05)
    assert four.parts["optimizer states"] / GIB == pytest.approx(32.4, abs=0.05)
    assert eight.parts["optimizer states"] / GIB == pytest.approx(62.0, abs=0.05)
    assert four.parts["activations"] / GIB == pytest.approx(5.0, abs=0.4)
    assert four.parts["working memory"] / GIB == pytest.approx(3.5, abs=0.3)
    assert four.needed < 108.6 * GIB and four.peak < 125 * GIB
    offloaded = estimate(QWEN_32B, STEP, dataclasses.replace(OPTIMIZERS["8-bit, in backward"][0],
                                                             offload=True))  # fmt: skip
    assert eight.peak - offloaded.peak == 62 * 8192 * 5120 * 2
    assert estimate(QWEN_32B, STEP, Setup()).needed > GPUS["h200"].memory


def test_less_memory_costs_what_it_should():
    """Every way to save memory saves it, and recomputation costs the FLOP of one more forward."""
    recomputed = estimate(QWEN_32B, STEP, Setup(in_backward=True))
    kept = estimate(QWEN_32B, STEP, Setup(in_backward=True, checkpointing=False))
    some = estimate(QWEN_32B, STEP, Setup(in_backward=True, keep_layers=3))
    assert recomputed.peak < some.peak < kept.peak
    assert recomputed.flops > some.flops > kept.flops
    assert estimate(QWEN_32B, STEP, Setup()).peak > recomputed.peak
    assert estimate(QWEN_32B, STEP, Setup(lora_rank=16, quantised=True)).peak < estimate(
        QWEN_32B, STEP, Setup(lora_rank=16)).peak  # fmt: skip
    assert estimate(QWEN_32B, STEP, Setup(gpus=8)).peak < estimate(QWEN_32B, STEP, Setup()).peak
    with pytest.raises(ValueError, match="keep_layers=65: the model has 64 layers"):
        estimate(QWEN_32B, STEP, Setup(keep_layers=65))
    # 6 FLOP per parameter and token without the embedding, and attention: by hand for the kept activations
    layers = sum(p.numel for p in parameters_of(QWEN_32B) if p.place == "layer" and p.linear)
    by_hand = 6 * layers * 8192 + 8 * 4096 * 5120 * 152064 + 3.5 * 4 * 8192 * 512 * 5120 * 64
    assert kept.flops == pytest.approx(by_hand, rel=1e-6)


def test_states_on_the_host_leave_slots_on_the_gpu_and_are_counted_there():
    resident, host = (
        estimate(QWEN_32B, STEP, Setup(states="4bit", in_backward=True, host_states=on_host)) for on_host in (0, 1)
    )
    states = resident.parts["optimizer states"]
    assert host.host_pinned == pytest.approx(states, rel=1e-3) and resident.host_pinned == 0
    assert host.host_needed == host.host_pinned + HOST_PROCESS
    assert host.work.to_device == host.work.to_host == pytest.approx(host.host_pinned, rel=1e-6)
    layer = sum(p.numel for p in parameters_of(QWEN_32B) if p.place == "layer") / QWEN_32B.num_hidden_layers
    slots = host.parts["optimizer states"]
    assert slots == pytest.approx(3 * 1.0625 * layer, rel=1e-3)
    assert resident.peak - host.peak == states - slots and host.needed < GPUS["h100"].memory


def test_slots_and_host_buffers_are_those_that_an_optimizer_makes():
    config = Qwen2Config(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prediction = estimate(config, Row(64, 32, 64), Setup(states="8bit", in_backward=True, host_states=True))
    host = AdamW(model.parameters(), states="8bit", in_backward=True, host_blocks=blocks_of(model))._host
    assert prediction.parts["optimizer states"] == sum(slot.memory.nbytes for slot in host._vacant)
    assert prediction.host_pinned == pytest.approx(host.nbytes, rel=0.02)


def test_weights_in_host_memory_are_those_that_stream():
    config = Qwen2Config(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    row, setup = Row(64, 32, 64), Setup(states="8bit", in_backward=True)
    resident, streams = (estimate(config, row, dataclasses.replace(setup, host_weights=on)) for on in (False, True))
    streamed = stream_weights(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), torch.device("cpu"))
    slots = sum(slot.memory.nbytes for slot in streamed._vacant)
    assert streams.pinned == {"weights": streamed.nbytes}
    # While it is loaded: embedding, head and norm on the host, and one tensor of 4 bytes beside its 2.
    assert streams.unpinned["loading"] == 2 * (2 * 2048 * 256 + 256) + 6 * 2048 * 256
    both = estimate(config, row, dataclasses.replace(setup, host_weights=True, host_states=True))
    assert both.unpinned["loading"] == 0 < both.pinned["optimizer states"] - streams.unpinned["loading"]  # later
    assert resident.parts["weights"] - streams.parts["weights"] == streamed.nbytes - slots


def test_every_part_is_counted_and_none_is_negative():
    """Over all ways to train."""
    setups = [setup for setup, _ in OPTIMIZERS.values()]
    setups += [dataclasses.replace(setup, gpus=4) for setup, _ in OPTIMIZERS.values() if setup.shards]
    setups += [Setup(keep_layers=2), Setup(offload=True), Setup(accumulates=True), Setup(head_cache=2**30)]
    # In two layers of this one gradients lead the peak, in 48 the activations do.
    uneven = QWEN_14B, Row(512, 256, 1024), Setup(weights="fp32", checkpointing=False)
    for config, row, setup in [*((QWEN_32B, STEP, setup) for setup in setups), uneven]:
        found = estimate(config, row, setup)
        assert min(found.parts.values()) >= 0 < found.parts["weights"], setup
        assert sum(found.parts.values()) == found.peak
        # Weights and gradients or slots at least, by hand: 14.77e9 parameters.
        if config is QWEN_14B:
            assert found.parts["weights"] == 4 * found.parameters and found.peak > 16 * found.parameters
        assert sum(found.pinned.values()) == found.host_pinned
        assert (found.host_pinned > 0) == (setup.host_states or setup.host_weights or setup.offload)
    assert QWEN_14B.dtype is None  # it is as it was, and a key of the profiles that are kept


def test_a_reference_costs_a_forward_and_no_memory():
    full, adapter = Setup(), Setup(lora_rank=16)
    for setup in (full, adapter):
        plain, own = (estimate(QWEN_32B, STEP, dataclasses.replace(setup, reference=each)) for each in (False, True))
        # Two FLOP a weight and token, and attention's, which is less.
        matmuls = 2 * (plain.parameters - 2 * QWEN_32B.vocab_size * QWEN_32B.hidden_size) * STEP.tokens
        assert matmuls < plain.forward_flops < 1.15 * matmuls, plain.forward_flops / matmuls
        assert own.peak == plain.peak
        assert own.flops - plain.flops == (plain.forward_flops if setup is adapter else 0)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("causal", "bart"), pytest.param("causal", "deepseek_v32", marks=pytest.mark.slow),
        pytest.param("multimodal", "ernie4_5_vl_moe", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_a_run_freezes_has_no_states_and_no_gradients(kind, name):
    """Cross-attention without its encoder, indexers that choose keys, experts of images in a text's layers."""
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if kind == "causal" else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    config = tiny_config(CONFIG_MAPPING[name]())
    config.architectures = [mapping[type(config)].__name__]
    model = mapping[type(config)](config)
    prepare_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    prediction = estimate(config, Row(64, 32, 96), Setup(weights="fp32", states="8bit"))
    assert [p.numel for p in parameters_of(config) if p.trained] == [p.numel() for p in trained]
    in_text = sum(p.numel() for p in language_model_of(model).parameters())
    assert prediction.trained == sum(p.numel() for p in trained) < in_text
    assert prediction.parts["weights"] == 4 * prediction.parameters
    assert prediction.parts["optimizer states"] == sum(moment_bytes(p.numel(), "8bit") for p in trained)
    on_host = estimate(config, Row(64, 32, 96), Setup(states="8bit", in_backward=True, host_states=True))
    blocks = [[p.numel() for p in block] for block in blocks_of(model)]
    assert on_host.pinned["optimizer states"] == sum(parcel_bytes(block, "8bit") for block in blocks)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=23, num_experts=4, num_experts_per_tok=2),
        GptOssConfig(**SMALL, head_dim=16, num_local_experts=4),
        DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4}, n_routed_experts=8, n_group=1, topk_group=1),
        pytest.param(Qwen3NextConfig(**SMALL, num_experts=4, num_experts_per_tok=2), marks=pytest.mark.slow),
        Gemma3TextConfig(**SMALL, head_dim=16),
        MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3),
        pytest.param(BloomConfig(vocab_size=512, hidden_size=64, n_layer=3, n_head=4), marks=pytest.mark.slow),
        # Reads values, and is a Llama of its widths.
        pytest.param(JetMoeConfig(**SMALL, kv_channels=16), marks=pytest.mark.slow),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("weights", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_every_kind_of_model_is_estimated(config, weights):
    """Experts of any width and dtype, values narrower than queries, recurrent layers, the layout separate."""
    prediction = estimate(config, Row(32, 16, 48, sequence_tokens=16), Setup(weights=weights))
    assert prediction.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert prediction.flops > 6 * 32 * 64 and prediction.parts["working memory"] > 0

"""Every model gets a layout that is exact for it or a reason, and a wrong plan or gradient does not pass for right."""

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing_cases import (
    expected,
    largest_error,
    loss_and_gradients,
    random_pairs,
    separate_stats,
    tiny_model,
)
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    DogeConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    xLSTMConfig,
)
from transformers.integrations import use_kernel_func_from_hub_with_fallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaMLP

from amopo_fast.models import attention, check
from amopo_fast.models.architecture import UnsupportedModelError, position_limit
from amopo_fast.models.check import choose_layout, prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.miniature import miniature, tiny_config
from amopo_fast.models.scoring import check_lengths, score
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels.rows import gather

NOT_CAUSAL = "it is not causal: another last token moves the logits of the tokens before it"
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def on_meta(config, model_class=None):
    """A model without weights: the check needs its class and configuration."""
    with torch.device("meta"):
        return (model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)


@pytest.mark.parametrize(
    "config, model_class, reason",
    [
        (T5Config(), T5ForConditionalGeneration, "it is an encoder-decoder model"),
        (BertConfig(num_hidden_layers=2), BertLMHeadModel, NOT_CAUSAL),
        (Gemma3TextConfig(use_bidirectional_attention=True), None, NOT_CAUSAL),
    ],
)
def test_refused_with_the_reason(config, model_class, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        choose_layout(on_meta(config, model_class))


@pytest.mark.parametrize(
    "config, model_class, layout, reason",
    [
        (LlamaConfig(num_hidden_layers=2), None, Layout.SHARED, ""),
        (Qwen3NextConfig(num_hidden_layers=4), None, Layout.STATES, ""),
        (FalconH1Config(num_hidden_layers=2), None, Layout.STATES, ""),
        (MambaConfig(num_hidden_layers=2), None, Layout.SEPARATE, "MambaMixer"),
        (BloomConfig(n_layer=2, hidden_size=64, n_head=4), None, Layout.SEPARATE, "takes no packed rows"),
        (BartConfig(is_encoder_decoder=False), BartForCausalLM, Layout.SEPARATE, "layout shared differ"),
    ],
)
def test_the_first_exact_layout_is_chosen(config, model_class, layout, reason):
    choice = choose_layout(on_meta(config, model_class))
    assert choice.layout is layout and reason in choice.reason and bool(reason) == bool(choice.reason)


def test_a_layout_that_is_asked_for_is_taken_or_refused():
    mamba = on_meta(MambaConfig(num_hidden_layers=2))
    with pytest.raises(UnsupportedModelError, match="MambaMixer did not get the row"):
        choose_layout(mamba, "shared")
    assert choose_layout(on_meta(LlamaConfig(num_hidden_layers=2)), "separate").layout is Layout.SEPARATE
    with pytest.raises(ValueError, match="layout='padded'; choose one of auto, shared, separate"):
        choose_layout(mamba, "padded")


class ConvolvedMLP(LlamaMLP):
    """An MLP that looks at the row's previous token."""

    def forward(self, x):
        return super().forward(x + F.pad(x[:, :-1], (0, 0, 1, 0)))


class DetachedMLP(LlamaMLP):
    """Right values, a wrong gradient in rows of batch size 1 that are longer than any sequence."""

    def forward(self, x):
        return super().forward(x.detach() if x.shape[1] > 40 else x)


class ScaledLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


@pytest.mark.parametrize("mlp, reason", [(ConvolvedMLP, "log-probs"), (DetachedMLP, "the gradient of")])
def test_the_miniature_finds_what_the_configuration_does_not_say(mlp, reason, monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", mlp)
    with pytest.raises(UnsupportedModelError, match=reason):
        choose_layout(LlamaForCausalLM(LlamaConfig(**SMALL)), "shared")


def test_logits_that_are_not_lm_heads_are_the_models_own():
    """Halved in forward, as no configuration says: its own head is used, and exact."""
    choice = choose_layout(ScaledLogits(LlamaConfig(**SMALL)))
    assert choice.layout is Layout.SHARED and choice.head is None


def test_the_check_leaves_the_model_and_the_random_state_alone():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    with torch.no_grad():
        choose_layout(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and torch.get_default_dtype() == torch.float32


def test_zero3_runs_no_layers_through_states(monkeypatch):
    """test_two_ranks.py trains such a model under DeepSpeed, where that is installed."""
    monkeypatch.setattr(check, "is_deepspeed_zero3_enabled", lambda: True)
    model = on_meta(FalconH1Config(num_hidden_layers=2))
    choice = choose_layout(model)
    assert choice.layout is Layout.SEPARATE and "ZeRO-3 does not run recurrent layers through states" in choice.reason
    with pytest.raises(UnsupportedModelError, match="ZeRO-2 and FSDP do"):
        choose_layout(model, "shared")
    assert choose_layout(on_meta(LlamaConfig(**SMALL))).layout is Layout.SHARED


def test_a_vision_language_model_is_tried_by_its_text():
    model = on_meta(Gemma3Config(vision_config={"num_hidden_layers": 2}))
    assert choose_layout(model).layout is Layout.SHARED
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"


def test_the_miniature_holds_every_kind_of_layer():
    tiny = tiny_config(Gemma3TextConfig())
    assert set(tiny.layer_types) == {"full_attention", "sliding_attention"} and tiny.num_hidden_layers == 6
    assert tiny.sliding_window < 20 and tiny.vocab_size == 64
    tiny = tiny_config(xLSTMConfig())
    assert tiny.num_blocks == tiny.num_hidden_layers == 2  # one depth under two names


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 40,
}  # fmt: skip


def test_longrope_packs_up_to_its_original_length_and_is_refused_beyond():
    config = Phi3Config(pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=40)
    assert position_limit(config) == 40
    assert position_limit(LlamaConfig()) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert position_limit(LlamaConfig(max_position_embeddings=512, rope_parameters=dynamic)) == 512
    tiny = prepare_model(MODEL_FOR_CAUSAL_LM_MAPPING[Phi3Config](tiny_config(config)))
    short, long = [PairTokens(0, (np.arange(1, n),), np.array([1]), np.array([2]), False) for n in (41, 42)]
    assert torch.isfinite(score(tiny, build_plan([short])).logp_sum).all()
    check_lengths(tiny, [short])
    with pytest.raises(ValueError, match="record 0: 41 tokens are beyond 40 positions"):
        check_lengths(tiny, [short, long])
    with pytest.raises(ValueError, match="a sequence of 41 tokens is beyond 40 positions"):
        score(tiny, build_plan([long]))


def test_chunked_attention_is_separate_beyond_a_chunk():
    config = tiny_config(Llama4TextConfig(attention_chunk_size=12))
    pairs = random_pairs(0, 2)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[Llama4TextConfig](config)
    truth = separate_stats(model, pairs).logp_sum
    prepare_model(model, "separate")
    check_lengths(model, pairs)
    torch.testing.assert_close(score(model, build_plan(pairs, Layout.SEPARATE)).logp_sum, truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="beyond 12 positions, .* or, with chunked attention, with"):
        choose_layout(model, "shared")


def test_a_shared_row_is_exact_up_to_a_chunk_and_refused_beyond():
    """Why the trial of Llama 4 need not cross a chunk: no shared row does."""
    config = tiny_config(Llama4TextConfig(attention_chunk_size=40))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[Llama4TextConfig](config)
    within, beyond = [PairTokens(0, (np.arange(1, n),), np.array([1]), np.array([2]), False) for n in (41, 42)]
    truth = separate_stats(model, [within]).logp_sum
    prepare_model(model, "shared")
    check_lengths(model, [within])
    torch.testing.assert_close(score(model, build_plan([within])).logp_sum, truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="record 0: 41 tokens are beyond 40 positions"):
        check_lengths(model, [within, beyond])
    with pytest.raises(ValueError, match="41 tokens is beyond 40 positions"):
        score(model, build_plan([beyond]))


def test_doge_is_limited_to_the_keys_that_it_keeps():
    assert position_limit(DogeConfig()) == position_limit(DogeConfig(), shared=False) == 2048


def test_noise_of_routers_is_said():
    model = prepare_model(on_meta(PhimoeConfig(num_hidden_layers=2)))
    said = choice_of(model).describe(0.5)
    assert "random in training: router_jitter_noise 0.01" in said and "0 in config.json" in said
    assert "random" not in choice_of(prepare_model(tiny_model("qwen3_moe"))).describe(0.5)


def test_a_head_that_is_initialised_late_leaves_the_embedding_it_is_tied_to_alone():
    """XLM's head is called after its embedding, and was given new weights then: its first forward was another's."""
    torch.manual_seed(0)
    tiny = miniature(on_meta(XLMConfig(n_layers=2, causal=True)))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(tiny(ids).logits, tiny(ids).logits)


def test_virtual_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        prepare_model(model)


def test_a_model_that_drops_the_plan_is_an_error_and_not_a_wrong_loss(monkeypatch):
    model = prepare_model(tiny_model("llama"))
    original = type(model.model.layers[0].self_attn).forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **{k: v for k, v in kwargs.items() if k != attention.KEYWORD})

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    with pytest.raises(RuntimeError, match="did not get the row"):
        score(model, build_plan(random_pairs(0, 1)))


# Mutations: each must move the loss or a gradient far beyond the tolerance.


def with_paths(plan, **changes):
    return replace(plan, paths=replace(plan.paths, **changes))


def wrong_positions(plan):
    return with_paths(plan, position_ids=torch.arange(plan.num_tokens)[None])


def labels_one_row_early(plan):
    return replace(plan, label_rows=(plan.label_rows - 1).clamp(min=0))


def sibling_keys(plan):
    """The last node sees one row of another branch in the place of one of its ancestors'."""
    indices, ends = plan.paths.kv_indices.clone(), plan.paths.cu_seqlens_k
    path = indices[ends[-2] : ends[-1]]
    path[0] = next(row for row in range(plan.num_tokens) if row not in path.tolist())
    return with_paths(plan, kv_indices=indices)


def top_left_alignment(plan):
    return with_paths(plan, position_ids=plan.paths.position_ids.flip(-1))


@pytest.mark.parametrize("mutation", [wrong_positions, labels_one_row_early, sibling_keys, top_left_alignment])
def test_a_wrong_plan_is_noticed(mutation):
    model = prepare_model(tiny_model("qwen3"))
    plan = build_plan(random_pairs(5, 2), min_node_tokens=4)
    assert largest_error(loss_and_gradients(model, score(model, plan)), expected("qwen3", 5, 2)) < 1e-5
    assert largest_error(loss_and_gradients(model, score(model, mutation(plan))), expected("qwen3", 5, 2)) > 1e-3


def first_branch_only(ctx, grad):
    order, offsets = ctx.saved_tensors
    return grad[order[offsets[:-1].long()].long()], None, None, None


def test_a_dropped_branch_gradient_is_noticed(monkeypatch):
    model = prepare_model(tiny_model("qwen3"))
    plan = build_plan(random_pairs(5, 2), min_node_tokens=4)
    monkeypatch.setattr(gather._GatherRows, "backward", staticmethod(first_branch_only))
    got = loss_and_gradients(model, score(model, plan))
    assert got[0] == pytest.approx(expected("qwen3", 5, 2)[0], rel=1e-5)
    assert largest_error(got, expected("qwen3", 5, 2)) > 1e-3
    with pytest.raises(UnsupportedModelError, match="the gradient of"):
        choose_layout(model, "shared")


@pytest.mark.parametrize("family, option", [("gemma3", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_an_option_that_is_ignored_is_noticed(monkeypatch, family, option):
    original = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: original(*args, **{**kwargs, option: None}))
    choice = choice_of(prepare_model(tiny_model(family)))
    assert choice.layout is Layout.SEPARATE and "log-probs in the layout shared differ" in choice.reason


def test_a_model_on_a_flash_implementation_is_checked_without_it():
    """Packed rows choose their own backend; the miniature runs on the CPU, where flash-attn does not."""
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert prepare_model(model).config._attn_implementation == "amopo_packed"


def test_kernels_of_a_gpu_are_left_out_of_the_trial(monkeypatch):
    """fla's and others' stand in the model's file where they are installed, and a miniature is on the CPU."""
    from transformers.models.falcon_h1 import modeling_falcon_h1 as file

    def kernel(*args, **kwargs):
        raise RuntimeError("expected a CUDA tensor")

    package = ModuleType("kernels_of_a_gpu")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name in ("causal_conv1d_fn", "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"):
        setattr(package, name, kernel)
        plain = inspect.unwrap(getattr(file, name))
        monkeypatch.setattr(file, name, use_kernel_func_from_hub_with_fallback(name, package.__name__)(plain))
    before = dict(vars(file))
    assert choose_layout(on_meta(FalconH1Config(num_hidden_layers=2))).layout is Layout.STATES
    assert vars(file) == before

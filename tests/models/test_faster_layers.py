"""Faster bodies: Liger's patch selects the body's kernels alone; compiled layers serve every row length."""

import sys

import pytest
import torch
import torch.nn.functional as F
from packing_cases import expected, largest_error, loss_and_gradients, random_pairs, separate_stats, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from amopo_fast.models import faster_layers
from amopo_fast.models.check import prepare_model
from amopo_fast.models.faster_layers import LIGER_BODY, compile_layers, liger_config
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan
from amopo_fast.training.config import AMoPOConfig


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_liger_patches_the_body_and_neither_forward_nor_cross_entropy(unpatched, family):
    pytest.importorskip("liger_kernel")
    from transformers.integrations.liger import apply_liger_kernel

    model = prepare_model(tiny_model(family))
    cross_entropy, forward = F.cross_entropy, type(model).forward
    apply_liger_kernel(model, liger_config(None))
    assert "forward" not in vars(model) and type(model).forward is forward
    assert F.cross_entropy is cross_entropy

    def source(function):
        return getattr(function, "__func__", function).__module__

    layer = model.model.layers[0]
    for module in (layer.input_layernorm, model.model.norm, layer.mlp):
        assert source(module.forward).startswith("liger_kernel"), module
    file = sys.modules[type(model).__module__]
    assert file.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    prepare_model(type(model)(model.config))  # on the CPU, though Liger's functions are in the class's file now


def test_a_patched_model_is_tried_without_the_patch(monkeypatch):
    def of_liger(*args, **kwargs):
        raise AssertionError("a Triton kernel on the CPU")

    of_liger.__module__ = "liger_kernel.transformers.rope"
    file = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", of_liger)
    prepare_model(tiny_model("llama"))
    assert file.apply_rotary_pos_emb is of_liger


def test_ligers_cross_entropy_is_refused():
    assert liger_config({"rope": False}) == {**LIGER_BODY, "rope": False}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy=True"):
        liger_config({"fused_linear_cross_entropy": True})


def test_the_option_follows_the_machine(tmp_path, monkeypatch):
    assert AMoPOConfig(output_dir=str(tmp_path), use_cpu=True).use_liger_kernel is False
    monkeypatch.setattr("amopo_fast.training.config.liger_by_default", lambda: True)
    config = AMoPOConfig(output_dir=str(tmp_path))
    assert config.use_liger_kernel and config.liger_kernel_config == LIGER_BODY
    assert AMoPOConfig(output_dir=str(tmp_path), use_liger_kernel=False).use_liger_kernel is False
    with pytest.raises(ValueError, match="use compile_layers"):
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, torch_compile=True)


# Dynamo's part decides about recompilation; the backend "eager" then runs the graphs as they are.
@pytest.mark.parametrize(
    "family, checkpointing",
    [("llama", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("llama", False), ("qwen2", True)])],
)
def test_compiled_layers_serve_every_length_and_equal_the_separate_sequences(family, checkpointing):
    torch._dynamo.reset()
    faster_layers._compiled_class.cache_clear()
    counter = CompileCounterWithBackend("eager")
    model = prepare_model(tiny_model(family))
    compile_layers(model, backend=counter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = []
    for count in (1, 2, 4):
        plan = build_plan(random_pairs(count, count), min_node_tokens=4)
        got = loss_and_gradients(model, score(model, plan))
        compiled.append(counter.frame_count)
        if count in (1, 4):
            assert largest_error(got, expected(family, count, count)) < 1e-5
    # At most one recompilation, at the second length; layers of a kind share their graphs.
    assert compiled[0] > 0 and compiled[-1] == compiled[1], compiled
    kinds = len(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    assert compiled[-1] <= 6 * kinds, compiled


def test_compiled_layers_leave_padded_batches_and_the_state_dict_alone():
    torch._dynamo.reset()
    faster_layers._compiled_class.cache_clear()
    counter = CompileCounterWithBackend("eager")
    model = tiny_model("llama").eval()
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    before, names = model(ids).logits, list(model.state_dict())
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    prepare_model(model)
    compile_layers(model, backend=counter)
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == names
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert counter.frame_count == 0
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_layers_under_lora(backend):
    from peft import LoraConfig, get_peft_model

    torch._dynamo.reset()
    faster_layers._compiled_class.cache_clear()
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    pairs = random_pairs(2, 2)
    truth = loss_and_gradients(model, separate_stats(model, pairs))
    prepare_model(model)
    counter = CompileCounterWithBackend(backend)
    compile_layers(model, backend=counter)
    got = loss_and_gradients(model, score(model, build_plan(pairs, min_node_tokens=4)))
    assert largest_error(got, truth) < 1e-5 and counter.frame_count

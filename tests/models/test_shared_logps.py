"""shared_logps in every layout equals the model's own forward over each sequence alone, gradients too."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import amopo_fast
from amopo_fast.models.choice import choice_of
from amopo_fast.models.miniature import tiny_config
from amopo_fast.packing.plan import Layout

V = 64  # tiny_config's vocabulary
# One of each layout, and one whose head is its own.
MODELS = {
    "Gemma2": Layout.SHARED, "ModernBertDecoder": Layout.SHARED, "Bamba": Layout.STATES, "Bloom": Layout.SEPARATE,
}  # fmt: skip


def tiny_model(name, **options):
    torch.manual_seed(0)
    config = tiny_config(getattr(transformers, f"{name}Config")(**options))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.set_attn_implementation("eager")
    for p in model.parameters():
        p.data += 1.5 * torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.1 * torch.randn_like(p)
    return model.train()


def batch():
    """Two prompts that begin alike, 5 and 2 completions, some of which begin alike; one of a token, one of none."""
    rng = np.random.default_rng(4)
    first = rng.integers(1, V, 43)
    second = np.concatenate([first[:21], rng.integers(1, V, 6)])
    opening = rng.integers(1, V, 18)
    completions = [np.concatenate([opening, rng.integers(1, V, 7)]), rng.integers(1, V, 1), rng.integers(1, V, 12),
                   opening, np.array([], dtype=np.int64), rng.integers(1, V, 9), rng.integers(1, V, 20)]  # fmt: skip
    return [first] * 5 + [second] * 2, completions


def one_by_one(model, prompts, completions, temperature):
    logps, entropies = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion]))
        logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        log_p = (logits[: len(completion)] / temperature).log_softmax(-1)
        logps.append(log_p.gather(1, ids[len(prompt) :, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return logps, entropies


def gradients(model, logps, entropies):
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    flat = torch.cat([*logps, *entropies])
    (flat * torch.randn(flat.shape, generator=generator)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert found[2].keys() == expected[2].keys()
    floor = 1e-3 * max(x.norm() for x in expected[2].values())
    for name, theirs in expected[2].items():
        assert (found[2][name] - theirs).norm() < tolerance * max(theirs.norm(), floor), name


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_and_kind_of_head(name, monkeypatch):
    monkeypatch.setattr("amopo_fast.models.head.OWN_HEAD_ROWS", 16)  # slices of the own head's rows
    model, (prompts, completions) = tiny_model(name), batch()
    expected = one_by_one(model, prompts, completions, 0.7)
    expected += (gradients(model, *expected),)
    found = amopo_fast.shared_logps(model, prompts, completions, temperature=0.7, return_entropy=True)
    assert choice_of(model).layout is MODELS[name] and (choice_of(model).head is None) == (name == "ModernBertDecoder")
    assert_equal((*found, gradients(model, *found)), expected, 3e-5)


def test_under_lora_with_checkpointing_and_lists_and_tensors():
    from peft import LoraConfig, get_peft_model

    prompts, completions = batch()
    targets = ["q_proj", "v_proj", "o_proj"]
    model = get_peft_model(tiny_model("Qwen3"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    expected = one_by_one(model, prompts, completions, 1.0)[0]
    expected = (expected, [], gradients(model, expected, []))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    given = [x.tolist() for x in prompts], [torch.from_numpy(x) for x in completions]
    logps = amopo_fast.shared_logps(model, *given)
    assert_equal((logps, [], gradients(model, logps, [])), expected, 3e-5)


def test_what_is_shared_is_computed_once():
    model, (prompts, completions) = tiny_model("Qwen3"), batch()
    amopo_fast.shared_logps(model, prompts, completions)
    computed = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    amopo_fast.shared_logps(model, prompts, completions)
    hook.remove()
    # The last token of a completion predicts nothing; a run of less than 16 tokens, the second prompt's, is not shared.
    assert computed == [43 + 24 + 0 + 11 + (6 + 8) + (6 + 19)]


class Wrapper(torch.nn.Module):
    """As DDP and FSDP: what matters happens around this module's forward."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_a_wrapper_sees_its_forward():
    wrapper = Wrapper(tiny_model("Qwen3"))
    logps = amopo_fast.shared_logps(wrapper, *batch())
    assert wrapper.calls == 1 and len(logps) == 7


def test_errors_name_what_was_found():
    model, (prompts, completions) = tiny_model("Qwen3"), batch()
    cases = [
        ((prompts[1:], completions), "6 prompts and 7 completions; give one prompt for each completion"),
        (([], []), "0 prompts and 0 completions"),
        (([[], [1]], [[1], [2]]), "prompt 0 has no tokens"),
        (([[1], [1]], [[1], [2, -100]]), "completion 1 has id -100 at 1, the model has 64 tokens"),
        (([[1], [64]], [[1], [2]]), "prompt 1 has id 64 at 0"),
        (([[1.0]], [[1]]), "prompt 0 is float64"),
        (([[[1]]], [[1]]), r"prompt 0 is int64 of shape \(1, 1\)"),
        (([[1]], [[]]), "every completion is empty"),
        (([[1]], [[1]], 0.0), "temperature must be positive and finite, got 0.0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            amopo_fast.shared_logps(model, *arguments)
    encoder = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=V)
    with pytest.raises(ValueError, match="it is an encoder-decoder model"):
        amopo_fast.shared_logps(transformers.T5ForConditionalGeneration(encoder), [[1]], [[2]])

"""Every family: loss and all gradients of a packed row equal the separate sequences' in float32."""

import json

import pytest
import torch
from packing_cases import (
    FAMILIES,
    expected,
    largest_error,
    loss_and_gradients,
    random_pairs,
    separate_stats,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan

TOLERANCE = 1e-5


def pairs_of(family):
    """1 to 5 pairs, another number for each family."""
    index = list(FAMILIES).index(family)
    return random_pairs(index, 1 + index % 5), (index, 1 + index % 5)


# Without checkpointing the layers run once, as they do in the forward with it: one family in every run, all as slow.
@pytest.mark.parametrize(
    "family, checkpointing",
    [
        *((family, True) for family in FAMILIES),
        *(pytest.param(f, False, marks=() if f == "llama" else pytest.mark.slow) for f in FAMILIES),
    ],
)
def test_packed_equals_separate(family, checkpointing):
    pairs, key = pairs_of(family)
    model = prepare_model(tiny_model(family))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = build_plan(pairs, min_node_tokens=4)
    assert plan.num_tokens < 0.8 * plan.unshared_tokens
    assert largest_error(loss_and_gradients(model, score(model, plan)), expected(family, *key)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_under_lora_with_checkpointing(family):
    from peft import LoraConfig, get_peft_model

    pairs, _ = pairs_of(family)
    torch.manual_seed(1)
    projections = ["q_a_proj", "o_proj"] if family == "deepseek_v3" else ["qkv_proj", "o_proj"]
    targets = projections if family in ("deepseek_v3", "phi3") else ["q_proj", "v_proj", "o_proj"]
    model = get_peft_model(tiny_model(family), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    truth = loss_and_gradients(model, separate_stats(model, pairs))
    prepare_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = loss_and_gradients(model, score(model, build_plan(pairs, min_node_tokens=4)))
    assert got[1].keys() == truth[1].keys() and all("lora" in name for name in got[1])
    assert largest_error(got, truth) < TOLERANCE


def outputs(model):
    """Logits of a padded batch and greedy tokens of generate()."""
    model.eval()
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        return (
            model(ids, attention_mask=mask).logits[mask.bool()],
            model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_object_generates_and_takes_padded_batches_as_before(family, tmp_path):
    model = tiny_model(family)
    before = outputs(model)
    implementation = model.config._attn_implementation
    prepare_model(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))

    # After a training step: as a model of the same weights that never saw a plan.
    model.train()
    score(model, build_plan(random_pairs(1, 2))).logp_sum.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    plain = tiny_model(family)
    plain.load_state_dict(model.state_dict())
    trained = outputs(plain)
    assert not torch.equal(trained[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), trained, strict=True))

    # Switched away and back, and saved: no trace of the packed implementation.
    model.set_attn_implementation(implementation)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), trained, strict=True))
    with pytest.raises(ValueError, match="call prepare_model"):
        score(model, build_plan(random_pairs(1, 1)))
    prepare_model(model).save_pretrained(tmp_path)
    assert "amopo" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), trained, strict=True))


def test_a_model_loaded_with_another_implementation_keeps_it():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    before = outputs(model)
    prepare_model(model)
    assert torch.equal(outputs(model)[0], before[0])
    pairs, key = pairs_of("llama")
    got = loss_and_gradients(model.train(), score(model, build_plan(pairs, min_node_tokens=4)))
    assert largest_error(got, expected("llama", *key)) < TOLERANCE


@pytest.mark.parametrize("square", [False, True])
def test_a_mask_of_a_model_s_own_is_refused(square):
    """Of its keys, or of queries and keys; the one that a row is handed tells no two tokens apart."""
    model = prepare_model(tiny_model("llama"))
    seen = []

    def masked(module, args, kwargs):
        tokens = kwargs["hidden_states"].shape[1]
        seen.append(kwargs["attention_mask"].shape)
        return args, kwargs | {"attention_mask": torch.ones(1, 1, tokens if square else 1, tokens, dtype=torch.bool)}

    model.model.layers[1].self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    with pytest.raises(ValueError, match="LlamaAttention gives its attention a mask, which packed attention does not"):
        score(model, build_plan(pairs_of("llama")[0], min_node_tokens=4))
    assert seen == [(1, 1, 1, 1)]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_padding_mask_beside_a_row_is_refused(attn):
    """One that leaves nothing out is none."""
    model = tiny_model("llama")
    model.set_attn_implementation(attn)
    model, pairs = prepare_model(model), pairs_of("llama")[0]
    plan = build_plan(pairs, min_node_tokens=4)
    mask = torch.ones(1, plan.num_tokens, dtype=torch.int64)

    def masked(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    before = score(model, plan).logps
    model.model.register_forward_pre_hook(masked, with_kwargs=True)
    assert torch.equal(score(model, plan).logps, before)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="mask that leaves tokens out.*--layout separate"):
        score(model, plan)

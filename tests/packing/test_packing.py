"""A packed row against the separate sequences: plan, loss and every gradient, in float32."""


import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from amopo_fast.plan import build_plan
from amopo_fast.prompts import PairTokens
from amopo_fast.scoring import prepare_model, score
from amopo_kernels import amopo_loss, reference, rows

V = 211
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
}


def random_pairs(rng, count, dimensions=3, shared=20, absent=False):
    pairs = []
    for record in range(count):
        user = rng.integers(0, V, rng.integers(3, 40))
        head = rng.integers(0, V, shared)
        prompts = [np.concatenate([head[: shared - k], [k], user]) for k in range(dimensions)]
        if absent and record == 0:
            prompts[1] = None
        opening = rng.integers(0, V, 18)
        chosen = np.concatenate([opening, rng.integers(0, V, rng.integers(1, 12))])
        rejected = np.concatenate([opening, rng.integers(0, V, rng.integers(1, 12))]) if record % 2 else chosen[:1]
        pairs.append(PairTokens(record, tuple(prompts), chosen, rejected, False))
    return pairs


def sequences_of(pairs):
    for pair in pairs:
        for prompt in pair.prompts:
            for response in (pair.chosen, pair.rejected):
                yield None if prompt is None else (np.concatenate([prompt, response]), len(prompt))


def separate_stats(model, pairs):
    """Each sequence alone, unpadded, full logits."""
    logps, cu = [], [0]
    for item in sequences_of(pairs):
        if item is None:
            cu.append(cu[-1])
            continue
        ids, prompt = item
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, prompt - 1 : -1].float()
        logps.append(logits.log_softmax(-1).gather(1, torch.from_numpy(ids[prompt:])[:, None])[:, 0])
        cu.append(cu[-1] + len(ids) - prompt)
    return reference.sequence_stats(torch.cat(logps), torch.tensor(cu, dtype=torch.int32))


def loss_and_gradients(model, stats, dimensions=3):
    model.zero_grad()
    noise = torch.randn(stats.length.numel() // (2 * dimensions), dimensions, 2, generator=torch.manual_seed(3))
    loss = amopo_loss(stats, num_dimensions=dimensions, beta=2.0, gamma=0.3, noise=noise).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance=1e-5):
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert (a[1][name] - b[1][name]).norm() <= tolerance * b[1][name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count, absent, checkpointing", [(1, False, False), (4, True, False), (3, False, True)])
def test_packed_loss_and_gradients_equal_the_separate_sequences(family, count, absent, checkpointing):
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    pairs = random_pairs(np.random.default_rng(count), count, absent=absent)
    expected = loss_and_gradients(model, separate_stats(model, pairs))
    prepare_model(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = build_plan(pairs, min_node_tokens=4)
    assert plan.num_tokens < 0.75 * plan.unshared_tokens
    assert_same(loss_and_gradients(model, score(model, plan)), expected)


def test_the_same_model_still_generates_and_takes_padded_batches():
    torch.manual_seed(0)
    model = FAMILIES["qwen2"]().eval()
    ids = torch.randint(1, V, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def outputs():
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        return model(ids, attention_mask=mask).logits, generated

    before = outputs()
    prepare_model(model)
    score(model, build_plan(random_pairs(np.random.default_rng(1), 2)))
    after = outputs()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def wrong_positions(plan):
    return {"position_ids": torch.arange(plan.num_tokens)[None]}


def shifted_labels(plan):
    return {"label_rows": (plan.label_rows - 1).clamp(min=0)}


def sibling_keys(plan):
    kv = plan.kv_indices.clone()
    kv[-plan.max_seqlen_q - 5 :] = plan.num_tokens // 2
    return {"kv_indices": kv}


@pytest.mark.parametrize("mutation", [wrong_positions, shifted_labels, sibling_keys])
def test_a_wrong_plan_is_noticed(mutation):
    from dataclasses import replace

    torch.manual_seed(0)
    model = prepare_model(FAMILIES["qwen2"]())
    pairs = random_pairs(np.random.default_rng(5), 2)
    plan = build_plan(pairs, min_node_tokens=4)
    right = loss_and_gradients(model, score(model, plan))
    wrong = loss_and_gradients(model, score(model, replace(plan, **mutation(plan))))
    with pytest.raises(AssertionError):
        assert_same(wrong, right, 1e-4)


def test_a_dropped_branch_gradient_is_noticed(monkeypatch):
    torch.manual_seed(0)
    model = prepare_model(FAMILIES["qwen2"]())
    plan = build_plan(random_pairs(np.random.default_rng(5), 2), min_node_tokens=4)
    right = loss_and_gradients(model, score(model, plan))

    def last_branch_only(ctx, grad):
        order, offsets = ctx.saved_tensors
        return grad[order[offsets[1:].long() - 1].long()], None, None, None

    monkeypatch.setattr(rows._GatherRows, "backward", staticmethod(last_branch_only))
    wrong = loss_and_gradients(model, score(model, plan))
    with pytest.raises(AssertionError):
        assert_same(wrong, right, 1e-4)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(lambda x: np.array(x))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens, tokens, tokens, st.booleans()), min_size=1, max_size=4), st.integers(1, 6)
)
def test_every_sequence_can_be_rebuilt_from_the_plan(raw, min_node_tokens):
    pairs = [
        PairTokens(i, (a, None if absent else b), chosen, rejected, False)
        for i, (a, b, chosen, rejected, absent) in enumerate(raw)
    ]
    plan = build_plan(pairs, min_node_tokens=min_node_tokens)
    path_of_row = {}
    q, k = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    for b in range(len(q) - 1):
        path = plan.kv_indices[k[b] : k[b + 1]].tolist()
        own = list(range(q[b], q[b + 1]))
        assert path[-len(own) :] == own
        for i, row in enumerate(own):
            path_of_row[row] = path[: len(path) - len(own) + i + 1]
    assert sorted(path_of_row) == list(range(plan.num_tokens))
    ids = plan.input_ids[0]
    for index, item in enumerate(sequences_of(pairs)):
        rows = plan.label_rows[plan.cu_seqlens[index] : plan.cu_seqlens[index + 1]].tolist()
        if item is None:
            assert rows == []
            continue
        sequence, prompt = item
        labels = plan.labels[plan.cu_seqlens[index] : plan.cu_seqlens[index + 1]]
        assert labels.tolist() == sequence[prompt:].tolist()
        for position, row in zip(range(prompt - 1, len(sequence) - 1), rows, strict=True):
            assert ids[path_of_row[row]].tolist() == sequence[: position + 1].tolist()
            assert plan.position_ids[0, row] == position

"""The plan: every sequence can be rebuilt from it, and nothing is computed twice that could be shared."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import random_pairs, sequences_of

from amopo_fast.packing.plan import build_plan, pair_sizes
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels import inverse_index


def check_plan(plan, pairs):
    """Follow every row's path: its tokens are the beginning of its sequence, its label the next token."""
    path_of_row = {}
    q, k = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    for b in range(len(q) - 1):
        path = plan.kv_indices[k[b] : k[b + 1]].tolist()
        own = list(range(q[b], q[b + 1]))
        assert own and path[-len(own) :] == own
        for i, row in enumerate(own):
            path_of_row[row] = path[: len(path) - len(own) + i + 1]
    assert sorted(path_of_row) == list(range(plan.num_tokens))
    assert plan.max_seqlen_q == plan.cu_seqlens_q.diff().max() and plan.max_seqlen_k == plan.cu_seqlens_k.diff().max()
    ids = plan.input_ids[0]
    lengths = {}
    for index, item in enumerate(sequences_of(pairs)):
        rows = plan.label_rows[plan.cu_seqlens[index] : plan.cu_seqlens[index + 1]].tolist()
        if item is None:
            assert rows == []
            continue
        sequence, prompt = item
        lengths.setdefault(index // (2 * plan.num_dimensions), []).append(len(sequence))
        labels = plan.labels[plan.cu_seqlens[index] : plan.cu_seqlens[index + 1]]
        assert labels.tolist() == sequence[prompt:].tolist()
        for position, row in zip(range(prompt - 1, len(sequence) - 1), rows, strict=True):
            assert ids[path_of_row[row]].tolist() == sequence[: position + 1].tolist()
            assert plan.position_ids[0, row] == position
    assert plan.unshared_tokens == sum(map(sum, lengths.values()))
    assert plan.padded_tokens == sum(len(pair) * max(pair) for pair in lengths.values())
    order, offsets = inverse_index(plan.kv_indices, plan.num_tokens)
    assert torch.equal(plan.kv_order, order) and torch.equal(plan.kv_offsets, offsets)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(np.array)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens, tokens, tokens, st.booleans()), min_size=1, max_size=5),
    st.integers(1, 6),
    st.booleans(),
)
def test_every_sequence_can_be_rebuilt(raw, min_node_tokens, share):
    pairs = [
        PairTokens(i, (a, None if absent else b), chosen, rejected, False)
        for i, (a, b, chosen, rejected, absent) in enumerate(raw)
    ]
    plan = build_plan(pairs, min_node_tokens=min_node_tokens, share=share)
    check_plan(plan, pairs)
    assert plan.records.tolist() == list(range(len(pairs))) and plan.num_dimensions == 2
    if share and min_node_tokens == 1:
        prefixes = {
            tuple(item[0][: n + 1]) for item in sequences_of(pairs) if item is not None for n in range(len(item[0]) - 1)
        }
        assert plan.num_tokens == len(prefixes)  # every distinct prefix once
    if not share:
        assert plan.num_tokens == plan.unshared_tokens - len([item for item in sequences_of(pairs) if item is not None])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_the_same_pairs_give_the_same_plan_and_a_pair_alone_is_counted_exactly(seed, count, absent):
    pairs = random_pairs(seed, count, absent=absent)
    plan, again = build_plan(pairs), build_plan(pairs)
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        same = getattr(again, field.name)
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    alone = [build_plan([pair]) for pair in pairs]
    assert [pair_sizes(pair) for pair in pairs] == [
        (p.num_tokens, p.unshared_tokens, p.padded_tokens, len(p.labels), int(p.cu_seqlens.diff()[::2].sum()))
        for p in alone
    ]
    assert plan.num_tokens <= sum(p.num_tokens for p in alone)
    assert plan.padded_tokens == sum(p.padded_tokens for p in alone)


def pair(prompts, chosen, rejected):
    return PairTokens(0, tuple(np.array(p) for p in prompts), np.array(chosen), np.array(rejected), False)


@pytest.mark.parametrize(
    "prompts, chosen, rejected, tokens",
    [
        ([[1, 2, 3]], [4, 5], [4, 5], 4),  # identical sequences: 1 2 3 4
        ([[1, 2, 3]], [4], [4, 5, 6], 5),  # a strict prefix of the other: 1 2 3, 1 2 3 4 5
        ([[1, 2, 3], [1, 2]], [3], [9], 3),  # a prompt inside another: 1 2 3
        ([[7, k] for k in range(5)], [8], [9], 6),  # a five-way branch: 7, then 0, 1, 2, 3, 4
        ([[1]], [2], [3], 1),  # one-token prompt and responses
        ([[1, 2], [5, 6]], [3, 4], [3, 5], 6),  # two roots: 1 2 3, 5 6 3
    ],
)
def test_shapes_of_the_trie(prompts, chosen, rejected, tokens):
    pairs = [pair(prompts, chosen, rejected)]
    plan = build_plan(pairs, min_node_tokens=1)
    check_plan(plan, pairs)
    assert plan.num_tokens == tokens


def test_a_run_shorter_than_a_node_is_computed_again():
    head = list(range(1, 11))
    pairs = [pair([[*head, 20, 21], [*head, 22, 23]], [30, 31], [40, 41])]  # the last token is never computed
    assert build_plan(pairs, min_node_tokens=2).num_tokens == 10 + 2 * (2 + 1 + 1)
    assert build_plan(pairs, min_node_tokens=3).num_tokens == 10 + 4 * 3
    assert build_plan(pairs, min_node_tokens=11).num_tokens == 2 * (12 + 1 + 1)
    assert build_plan(pairs, min_node_tokens=13).num_tokens == 4 * 13


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], "at least one pair"),
        ([pair([[1]], [2], [3]), pair([[1], [2]], [2], [3])], "record 0 has 2 dimensions"),
        ([pair([[]], [2], [3])], "the prompt has no tokens"),
        ([pair([[1]], [2], [])], "the rejected response has no tokens"),
        ([PairTokens(4, (None,), np.array([1]), np.array([2]), False)], r"records \[4\]: every dimension is absent"),
    ],
)
def test_bad_pairs_are_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        build_plan(pairs)


def test_pinning_and_moving_keep_everything():
    plan = build_plan(random_pairs(0, 2))
    moved = plan.to("cpu")
    assert all(
        torch.equal(getattr(moved, f.name), getattr(plan, f.name))
        if isinstance(getattr(plan, f.name), torch.Tensor)
        else getattr(moved, f.name) == getattr(plan, f.name)
        for f in dataclasses.fields(plan)
    )

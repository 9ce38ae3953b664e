"""The plan of epochs and the noise: pure functions of seed, epoch and record."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.packing.schedule import PairSizes, best_fit, noise, plan_epochs
from amopo_fast.prompts.tokens import PairTokens


def sizes_of(tokens, longest=None):
    tokens = np.asarray(tokens)
    longest = np.zeros_like(tokens) if longest is None else np.asarray(longest)
    return PairSizes(tokens, tokens, tokens, tokens, tokens, longest)


def test_noise_is_standard_normal_and_depends_on_each_key():
    draws = np.stack([noise(7, epoch, record, 4) for epoch in range(5) for record in range(2000)])
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    assert len(np.unique(draws)) > 0.999 * draws.size
    assert np.array_equal(noise(7, 1, 3, 4), noise(7, 1, 3, 4))
    for other in ((8, 1, 3), (7, 2, 3), (7, 1, 4)):
        assert not np.array_equal(noise(7, 1, 3, 4), noise(*other, 4))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 3), st.integers(100, 2000)
)
def test_every_pair_once_an_epoch_in_steps_of_the_same_pairs_on_any_split(tokens, pairs_per_step, world, budget):
    pairs_per_step = max(pairs_per_step, world)
    plans = [
        plan_epochs(sizes_of(tokens), pairs_per_step=pairs_per_step, tokens_per_micro_batch=budget, epochs=2, seed=3,
                    world_size=world, rank=rank)
        for rank in range(world)
    ]  # fmt: skip
    alone = plan_epochs(
        sizes_of(tokens), pairs_per_step=pairs_per_step, tokens_per_micro_batch=10**9, epochs=2, seed=3
    )
    for epoch in range(2):
        assert len({len(plan.epochs[epoch]) for plan in plans}) == 1
        steps = [
            sorted(
                i
                for plan in plans
                for batch in plan.epochs[epoch][begin : begin + plan.accumulation]
                if batch.weight
                for i in batch.pairs
            )
            for begin in range(0, len(plans[0].epochs[epoch]), plans[0].accumulation)
        ]
        assert steps == [sorted(batch.pairs) for batch in alone.epochs[epoch]]
        assert all(
            batch.step_pairs == len(step)
            for plan in plans
            for number, step in enumerate(steps)
            for batch in plan.epochs[epoch][number * plan.accumulation : (number + 1) * plan.accumulation]
        )
        assert sorted(i for step in steps for i in step) == list(range(len(tokens)))
    for plan in plans:
        for batch in plan.epochs[0]:
            assert len(batch.pairs) == 1 or sum(tokens[i] for i in batch.pairs) <= budget


def test_fewer_pairs_than_ranks_is_refused():
    with pytest.raises(ValueError, match="pairs_per_step=1 is less than the 2 ranks"):
        plan_epochs(sizes_of([5, 5]), pairs_per_step=1, tokens_per_micro_batch=10, epochs=1, seed=0, world_size=2)


def plan(tokens, budget, pairs_per_step=8, **options):
    fixed = dict(epochs=2, seed=0, pairs_per_step=pairs_per_step, tokens_per_micro_batch=budget)
    return plan_epochs(sizes_of(tokens), **fixed, **options)


def test_micro_batches_are_packed_best_fit():
    # 70+30, 60+40, 50+50 fill three micro-batches of 100; an even split by load would need a fourth.
    schedule = plan([70, 60, 50, 50, 40, 30], 100)
    assert schedule.accumulation == 3
    tokens = np.array([70, 60, 50, 50, 40, 30])
    assert [tokens[list(batch.pairs)].sum() for batch in schedule.epochs[0]] == [100, 100, 100]


def test_a_step_that_needs_fewer_micro_batches_is_split_and_not_filled():
    tokens = [90] * 8 + [10] * 8
    schedule = plan(tokens, 100)
    assert schedule.accumulation >= 4
    assert all(batch.weight == 1 for epoch in schedule.epochs for batch in epoch)
    assert all(len(epoch) == 2 * schedule.accumulation for epoch in schedule.epochs)


@pytest.mark.parametrize("budget", [300, 10**6])
@pytest.mark.parametrize("world", [1, 3])
def test_the_longest_come_first(budget, world):
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, 61)
    tokens[int(rng.integers(61))] = 500
    ranks = [plan(tokens, budget, world_size=world, rank=rank) for rank in range(world)]
    for schedule in ranks:
        for epoch in schedule.epochs:
            sums = [tokens[list(batch.pairs)].sum() * batch.weight for batch in epoch]
            for begin in range(0, len(sums), schedule.accumulation):
                step = sums[begin : begin + schedule.accumulation]
                assert step == sorted(step, reverse=True)
    first = [i for schedule in ranks for batch in schedule.epochs[0][: schedule.accumulation] for i in batch.pairs]
    assert tokens.argmax() in first


def test_an_oversized_pair_stands_alone():
    schedule = plan([500, 20, 30, 40], 100)
    assert [batch.pairs for batch in schedule.epochs[0]][0] == (0,)
    assert schedule.accumulation == 2


def test_the_description_counts_what_the_data_costs():
    pairs = [
        PairTokens(0, (np.arange(40), np.arange(100, 140)), np.arange(900, 930), np.arange(950, 960), False),
        PairTokens(1, (np.arange(60), None), np.arange(900, 905), np.arange(950, 952), False),
    ]
    sizes = PairSizes.of(pairs)
    assert sizes.padded.tolist() == [4 * 70, 2 * 65] and sizes.unshared.tolist() == [2 * (70 + 50), 65 + 62]
    assert sizes.computed.tolist() == [2 * (40 + 29 + 9), 60 + 4 + 1] and sizes.labels.tolist() == [80, 7]
    text = plan(sizes.computed, 100).describe(sizes, 100)
    assert text.splitlines() == [
        "2 pairs an epoch: 410 tokens padded, 367 without padding, 221 computed (1.86 padded tokens each), 87 labels",
        "1 optimizer steps an epoch, 2 micro-batches each of 110 computed tokens on average; the longest has 156, "
        "the first one 156",
        "1 pairs are longer than tokens_per_micro_batch=100: each is a micro-batch alone",
    ]


def unlike_pairs(seed, count):
    rng = np.random.default_rng(seed)
    return [
        PairTokens(i, tuple(rng.integers(1, 99, n) if k else None for k, n in enumerate(rng.integers(1, 300, 3))),
                   rng.integers(1, 99, rng.integers(1, 200)), rng.integers(1, 99, rng.integers(1, 200)), False)
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("budget, bins", [(1, 1), (4000, 1), (4000, 30), (10**6, 3)])
def test_padding_counts_where_each_sequence_is_a_row(budget, bins):
    pairs = unlike_pairs(budget, 40)
    sizes = PairSizes.of(pairs, Layout.SEPARATE)
    groups = best_fit(range(len(pairs)), sizes, budget, bins)
    assert sorted(i for group in groups for i in group) == list(range(len(pairs))) and len(groups) >= bins
    plans = [build_plan([pairs[i] for i in group], Layout.SEPARATE) for group in groups]
    for group, plan in zip(groups, plans, strict=True):
        assert plan.num_tokens == sizes.tokens(group)  # exactly
        assert plan.num_tokens <= budget or len(group) == 1
    assert [plan.num_tokens for plan in plans] == sorted((plan.num_tokens for plan in plans), reverse=True)


def test_rows_of_about_one_length_stand_together():
    sizes = sizes_of([100, 20, 90, 18, 96, 22], longest=[50, 10, 45, 9, 48, 11])  # two rows each
    assert best_fit(range(6), sizes, 310) == [[0, 4, 2], [5, 1, 3]]
    # By tokens alone 100, 96, 90 and 22 would come together, in 8 rows of 50.
    assert best_fit(range(6), sizes, 10**6, 2) == [[0, 4, 2], [5, 1, 3]]

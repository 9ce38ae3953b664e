"""The plan of epochs and the noise: pure functions of seed, epoch and record."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.packing.schedule import PairSizes, Schedule, best_fit, noise
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
    sizes = sizes_of(tokens)
    ranks = [Schedule(sizes, pairs_per_step, budget, 3, world, rank) for rank in range(world)]
    alone = Schedule(sizes, pairs_per_step, 10**9, 3)
    for number in (0, 1, 10**9):
        epochs = [schedule.epoch(number) for schedule in ranks]
        count = epochs[0].accumulation
        assert {(each.accumulation, len(each.batches)) for each in epochs} == {(count, len(epochs[0].batches))}
        assert ranks[0].accumulation(number) == count and -(-len(epochs[0].batches) // count) == alone.steps
        steps = [
            [batch for each in epochs for batch in each.batches[begin : begin + count]]
            for begin in range(0, len(epochs[0].batches), count)
        ]
        pairs = [sorted(i for batch in step if batch.weight for i in batch.pairs) for step in steps]
        assert pairs == [sorted(batch.pairs) for batch in alone.epoch(number).batches]
        assert all(batch.step_pairs == len(own) for step, own in zip(steps, pairs, strict=True) for batch in step)
        assert sorted(chain(*pairs)) == list(range(len(tokens)))
        for batch in chain(*steps):
            assert len(batch.pairs) == 1 or sum(tokens[i] for i in batch.pairs) <= budget


def test_fewer_pairs_than_ranks_is_refused():
    with pytest.raises(ValueError, match="pairs_per_step=1 is less than the 2 ranks"):
        Schedule(sizes_of([5, 5]), 1, 10, 0, world_size=2)
    with pytest.raises(ValueError, match="no pairs to train on"):
        Schedule(sizes_of([]), 1, 10, 0)


def plan(tokens, budget, pairs_per_step=8, **options):
    return Schedule(sizes_of(tokens), pairs_per_step, budget, 0, **options)


def test_micro_batches_are_packed_best_fit():
    # 70+30, 60+40, 50+50 fill three micro-batches of 100; an even split by load would need a fourth.
    epoch = plan([70, 60, 50, 50, 40, 30], 100).epoch(0)
    assert epoch.accumulation == 3
    tokens = np.array([70, 60, 50, 50, 40, 30])
    assert [tokens[list(batch.pairs)].sum() for batch in epoch.batches] == [100, 100, 100]


def test_a_step_that_needs_fewer_micro_batches_is_split_and_not_filled():
    tokens = [90] * 8 + [10] * 8
    for number in (0, 1):
        epoch = plan(tokens, 100).epoch(number)
        assert epoch.accumulation >= 4 and len(epoch.batches) == 2 * epoch.accumulation
        assert all(batch.weight == 1 for batch in epoch.batches)


@pytest.mark.parametrize("budget", [300, 10**6])
@pytest.mark.parametrize("world", [1, 3])
def test_the_longest_come_first(budget, world):
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, 61)
    tokens[int(rng.integers(61))] = 500
    ranks = [plan(tokens, budget, world_size=world, rank=rank) for rank in range(world)]
    for epoch in (schedule.epoch(number) for schedule in ranks for number in (0, 1)):
        sums = [tokens[list(batch.pairs)].sum() * batch.weight for batch in epoch.batches]
        for begin in range(0, len(sums), epoch.accumulation):
            step = sums[begin : begin + epoch.accumulation]
            assert step == sorted(step, reverse=True)
    firsts = [epoch.batches[: epoch.accumulation] for epoch in (schedule.epoch(0) for schedule in ranks)]
    assert tokens.argmax() in [i for batch in chain(*firsts) for i in batch.pairs]


def test_an_oversized_pair_stands_alone():
    epoch = plan([500, 20, 30, 40], 100).epoch(0)
    assert epoch.batches[0].pairs == (0,) and epoch.accumulation == 2


def test_the_description_counts_what_the_data_costs():
    pairs = [
        PairTokens(0, (np.arange(40), np.arange(100, 140)), np.arange(900, 930), np.arange(950, 960), False),
        PairTokens(1, (np.arange(60), None), np.arange(900, 905), np.arange(950, 952), False),
    ]
    sizes = PairSizes.of(pairs)
    assert sizes.padded.tolist() == [4 * 70, 2 * 65] and sizes.unshared.tolist() == [2 * (70 + 50), 65 + 62]
    assert sizes.computed.tolist() == [2 * (40 + 29 + 9), 60 + 4 + 1] and sizes.labels.tolist() == [80, 7]
    text = Schedule(sizes, 8, 100, 0).describe()
    assert text.splitlines() == [
        "2 pairs an epoch: 410 tokens padded, 367 without padding, 221 computed (1.86 padded tokens each), 87 labels",
        "1 optimizer steps an epoch; in the first 2 micro-batches a step, of 110 computed tokens on average; the "
        "longest has 156, the first one 156",
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

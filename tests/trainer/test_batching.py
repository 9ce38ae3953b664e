"""The plan of epochs and the noise: pure functions of seed, epoch and record."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amopo_fast.batching import noise, plan_epochs


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
        plan_epochs(tokens, pairs_per_step=pairs_per_step, tokens_per_micro_batch=budget, epochs=2, seed=3,
                    world_size=world, rank=rank)
        for rank in range(world)
    ]  # fmt: skip
    alone = plan_epochs(tokens, pairs_per_step=pairs_per_step, tokens_per_micro_batch=10**9, epochs=2, seed=3)
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
        assert sorted(i for step in steps for i in step) == list(range(len(tokens)))
    for plan in plans:
        for batch in plan.epochs[0]:
            assert len(batch.pairs) == 1 or sum(tokens[i] for i in batch.pairs) <= budget


def test_fewer_pairs_than_ranks_is_refused():
    with pytest.raises(ValueError, match="pairs_per_step=1 is less than the 2 ranks"):
        plan_epochs([5, 5], pairs_per_step=1, tokens_per_micro_batch=10, epochs=1, seed=0, world_size=2)

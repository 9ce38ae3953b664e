"""Epochs are planned when they begin: how many there are costs nothing, and each may split its steps in its own way."""

import numpy as np
import pytest
import torch
from small_run import small_model, small_pairs, small_trainer
from transformers import TrainerCallback

from amopo_fast.packing.schedule import PairSizes, Schedule
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training import epochs

BUDGET = 290  # computed tokens
RUN = {"eval_strategy": "no", "logging_steps": 1, "num_train_epochs": 3, "save_strategy": "no"}


def uneven_pairs():
    """Whose steps of four need other numbers of micro-batches from epoch to epoch."""
    rng = np.random.default_rng(3)
    lengths = [50, 50, 40, 30, *[5] * 7]
    prompts = [tuple(rng.integers(0, 97, length) for _ in range(2)) for length in lengths]
    return [PairTokens(i, p, rng.integers(0, 97, 5), rng.integers(0, 97, 4), False) for i, p in enumerate(prompts)]


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def weights(run):
    return [parameter.detach() for parameter in run.model.parameters()]


def test_every_epoch_splits_its_steps_as_it_needs_and_goes_on_bit_for_bit(tmp_path):
    schedule = Schedule(PairSizes.of(uneven_pairs()), 4, BUDGET, 42)
    assert [schedule.epoch(number).accumulation for number in range(3)] == [1, 2, 1]
    options = {**RUN, "pairs": uneven_pairs(), "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}

    def run(name, **changes):
        return small_trainer(tmp_path / name, model=small_model(attention_dropout=0.0), **{**options, **changes})

    whole = run("whole", tokens_per_micro_batch=10**6)
    whole.train()
    split = run("split", tokens_per_micro_batch=BUDGET)
    split.train()
    assert split.state.global_step == whole.state.global_step == 9 and split.state.epoch == 3.0
    for a, b in zip(weights(split), weights(whole), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    for step in (1, 5, 6):  # within epochs and between them
        resumed = run(f"from{step}", tokens_per_micro_batch=BUDGET)
        resumed.train(resume_from_checkpoint=str(tmp_path / "split" / f"checkpoint-{step}"))
        assert all(map(torch.equal, weights(resumed), weights(split))), step
        losses = [line["loss"] for line in resumed.state.log_history if "loss" in line]
        assert losses == [line["loss"] for line in split.state.log_history if "loss" in line]


@pytest.mark.parametrize("length", [{"max_steps": 2_000_000}, {"num_train_epochs": 1e9}])
def test_how_many_epochs_there_are_costs_nothing(tmp_path, monkeypatch, length):
    planned = []
    epoch = Schedule.epoch
    monkeypatch.setattr(Schedule, "epoch", lambda self, number: planned.append(number) or epoch(self, number))
    run = small_trainer(tmp_path, **{**RUN, **length}, pairs=small_pairs(45), callbacks=[Stop(13)])
    run.train()
    assert run.state.global_step == 13 and run.state.max_steps == length.get("max_steps", 12 * 10**9)
    assert set(planned) == {0, 1} and len(planned) <= 4


def test_a_step_in_the_backward_pass_has_one_micro_batch_in_every_epoch(tmp_path, monkeypatch):
    options = {**RUN, "pairs": uneven_pairs(), "optim_in_backward": "adamw", "tokens_per_micro_batch": BUDGET}
    with pytest.raises(ValueError, match="is split into 2 micro-batches.*raise tokens_per_micro_batch"):
        small_trainer(tmp_path, **options)
    monkeypatch.setattr(epochs, "_PAIRS_AHEAD", 1)  # as of a run that is too long to be looked through
    run = small_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="optim_in_backward=adamw, epoch 1: .*; then resume"):
        run.train()
    assert run.state.global_step == 3

"""Other trainers' names of options lead to ours, which exist, or to a reason."""

import dataclasses

import pytest

from amopo_fast.cli import spellings
from amopo_fast.data.config import DataConfig
from amopo_fast.models.config import ModelConfig
from amopo_fast.training.config import AMoPOConfig

OURS = {each.name for kind in (DataConfig, ModelConfig, AMoPOConfig) for each in dataclasses.fields(kind)}


def test_every_name_leads_to_an_option_that_exists():
    assert set(spellings._SAME) <= OURS
    theirs = [name for names in spellings._SAME.values() for name in names.split()]
    assert len(set(theirs)) == len(theirs) and not set(theirs) & set(spellings._NO_OPTION)
    assert not (set(theirs) | set(spellings._NO_OPTION)) & OURS  # which would never be asked for


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("lora_rank", "lora_r"), ("dtype", "weight_precision"), ("loss_type", "objective"),
        ("cutoff_len", "max_length"), ("dataset_name", "train_data"), ("pref_beta", "beta"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("base_model", "model_name_or_path"), ("val_set_size", "eval_share"),
    ],
)  # fmt: skip
def test_a_name_of_trl_llama_factory_or_axolotl(theirs, ours):
    flags = [f"--{name}" for name in OURS]
    for written in (f"--{theirs}", f"--{theirs.replace('_', '-')}"):
        assert spellings.hint(written, flags, flags=True) == f"; did you mean '--{ours}'?"
    assert spellings.hint(theirs, OURS) == f"; did you mean '{ours}'?"

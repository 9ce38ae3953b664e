"""What a Python program gives a trainer or a configuration, and may not, is named with what to give instead."""

import pytest
import torch
from run_training import V, pairs
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.errors import OptionError
from amopo_fast.training.checks import OWN
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer


@pytest.fixture
def trainer_of(tmp_path):
    def make(**given):
        shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
        args = AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
        given = {"model": Qwen2ForCausalLM(Qwen2Config(**shape)), "args": args, "dimensions": ["first", "second"],
                 "train_dataset": list(pairs(4)), **given}  # fmt: skip
        return AMoPOTrainer(given.pop("model"), given.pop("args"), **given)

    return make


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": torch.nn.Linear(2, 2)}, "model is Linear .*: give the name or folder of a causal LM as text"),
        ({"model": None}, "model is NoneType None: give"),
        ({"dimensions": "first"}, "dimensions is str 'first': give a list of names"),
        ({"train_dataset": (pair for pair in pairs(2))}, "train_dataset is generator .*: give a list, or what has a"),
        ({"eval_dataset": {"a": iter(())}}, "eval_dataset is .*: give a list, or what has a length"),
        ({"eval_dataset": [{"prompt": "a"}]}, "eval_dataset holds dict .*: give tokenised pairs"),
        *(({name: None}, f"{name} is refused: .") for name in OWN),
    ],
)
def test_a_trainer_names_what_it_cannot_take(trainer_of, given, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**given)


def test_training_without_data_is_named(trainer_of):
    with pytest.raises(ValueError, match="train_dataset is missing"):
        trainer_of(train_dataset=None).train()


@pytest.mark.parametrize(
    "option, value, takes",
    [
        *((name, value, "a number") for name, value in (("beta", "x"), ("tau", [1.0]), ("gamma", True))),
        *((name, value, "a whole number") for name, value in (
            ("max_steps", "3"), ("pairs_per_step", "4"), ("seed", 1.5), ("seed", None), ("keep_layers", True),
            ("tokens_per_micro_batch", 1e4), ("save_total_limit", 2.0))),
        *((name, value, "true or false") for name, value in (
            ("gradient_checkpointing", "false"), ("bf16", 1), ("push_to_hub", "no"), ("memory_check", None))),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(tmp_path, option, value, takes):
    with pytest.raises(OptionError, match=f"{option} is {type(value).__name__} .*: write {takes}") as caught:
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **{option: value})
    assert caught.value.option == option

"""A run of seconds that has everything a resume can get wrong: dropout, partial log windows, evaluation at epochs."""

import numpy as np
import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

V = 97
DIMENSIONS = ["first", "second"]


def small_pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for record in range(count):
        user = rng.integers(0, V, rng.integers(4, 12))
        prompts = tuple(np.concatenate([[k], user]) for k in range(2))
        pairs.append(PairTokens(record, prompts, rng.integers(0, V, 5), rng.integers(0, V, rng.integers(1, 7)), False))
    return pairs


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": 0.1}  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**{**shape, **options}))


def small_trainer(output_dir, *, pairs=None, model=None, callbacks=None, recipe=None, peft_config=None, **options):
    if options.get("save_strategy", "steps") == "steps":
        options.setdefault("save_steps", 2)
    config = AMoPOConfig(
        **{
            "output_dir": str(output_dir), "pairs_per_step": 4, "tokens_per_micro_batch": 120, "num_train_epochs": 2,
            "use_cpu": True, "learning_rate": 1e-2, "save_strategy": "steps", "save_total_limit": 2,
            "logging_steps": 3, "eval_strategy": "epoch", "disable_tqdm": True, "report_to": "none", **options,
        }
    )  # fmt: skip
    trainer = AMoPOTrainer(
        model or small_model(), config, dimensions=DIMENSIONS, callbacks=callbacks, recipe=recipe,
        peft_config=peft_config, train_dataset=pairs or small_pairs(14), eval_dataset=small_pairs(4, seed=1),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer

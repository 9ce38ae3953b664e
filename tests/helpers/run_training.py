"""A tiny training run of eight steps."""

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

V = 97


def pairs(count):
    rng = np.random.default_rng(0)
    for record in range(count):
        user = rng.integers(0, V, rng.integers(4, 20))
        prompts = tuple(np.concatenate([[k], user]) for k in range(2))
        yield PairTokens(record, prompts, rng.integers(0, V, 6), rng.integers(0, V, rng.integers(1, 9)), False)


def trainer(output_dir, budget=120, **options):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, attention_dropout=0.1)
    )  # fmt: skip
    saves = options.get("save_strategy", "steps") == "steps"
    options = {"save_strategy": "steps", **({"save_steps": 2} if saves else {}), **options}
    config = AMoPOConfig(
        **{"output_dir": str(output_dir), "pairs_per_step": 4, "tokens_per_micro_batch": budget, "num_train_epochs": 2,
           "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, **options},
    )  # fmt: skip
    return AMoPOTrainer(model, config, dimensions=["first", "second"], train_dataset=list(pairs(14)))

"""The demo's model, made in code: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.demo.tokenizer import demo_tokenizer

# Names are AMoPOConfig's. Found by experiment on this data: half the rate learns the facts too late, twice the rate
# loses them again; without the chosen response's likelihood a model from scratch orders responses and writes none.
DEMO_TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "num_train_epochs": 4,
    "pairs_per_step": 8,
    "beta": 5.0,
    "gamma": 0.5,
    "sft_coef": 1.0,
    "max_length": 256,
}


def demo_config() -> Qwen2Config:
    """Qwen2's architecture at toy size, for `demo_tokenizer`."""
    tokenizer = demo_tokenizer()
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        # Copying a word of the prompt is then near the identity, and 0.02 would be far from 1/sqrt(hidden_size).
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def demo_model(seed: int) -> Qwen2ForCausalLM:
    """The untrained model, float32 on the CPU; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(demo_config())

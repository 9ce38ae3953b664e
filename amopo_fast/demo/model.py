"""The demo's tokenizer and model, both made in code: nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from amopo_fast.demo.data import TRAIN_FILE
from amopo_fast.prompts.builder import CHATML
from amopo_fast.prompts.wording import DEFAULT_TEMPLATE

VOCABULARY = 1280
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Names are AMoPOConfig's. Found by experiment on this data: half the rate learns the facts too late, twice the rate
# loses them again.
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
    "max_length": 256,
}


@functools.cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    # The instructions stand in every prompt but only once in their file.
    wording = [DEFAULT_TEMPLATE.read_text(encoding="utf-8")] * 20
    roles = "system\nuser\nassistant\n"
    tokenizer.train_from_iterator([TRAIN_FILE.read_text(encoding="utf-8"), *wording, roles], trainer)
    return tokenizer.to_str()


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the bundled training text and the instructions, with ChatML as its template.

    Words that only the held-out text has are spelled with smaller pieces.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_START],
        chat_template=CHATML,
        model_max_length=512,
    )


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

"""The demo's tokenizer, made in code: nothing is downloaded."""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from amopo_fast.demo.data import TRAIN_FILE
from amopo_fast.prompts.chat import CHATML
from amopo_fast.prompts.wording import DEFAULT_TEMPLATE

VOCABULARY = 1280
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@functools.cache
def _bpe() -> str:
    """A trained tokenizer's JSON, with the normaliser and the pre-tokeniser that AutoTokenizer gives any tokenizer that
    lies beside a Qwen2 model."""
    tokenizer = Tokenizer(models.BPE())
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
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


def demo_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE trained on the bundled training text and the instructions, with ChatML as its template.

    Words that only the held-out text has are spelled with smaller pieces. Saved beside the demo's model and loaded
    again, it makes the same tokens.
    """
    model = json.loads(_bpe())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_START],
        chat_template=CHATML,
        model_max_length=512,
    )

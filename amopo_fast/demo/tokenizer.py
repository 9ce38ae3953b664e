"""The demo's tokenizer, made in code: nothing is downloaded."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from amopo_fast.demo.data import TRAIN_FILE
from amopo_fast.prompts.chat import CHATML
from amopo_fast.prompts.wording import DEFAULT_TEMPLATE

VOCABULARY = 1280
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


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

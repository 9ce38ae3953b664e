"""Tokenizers made on the spot: of every kind, a few hundred tokens each, and chat templates in the known shapes."""

import functools
import json

from chat_templates import Family
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Write a response that a careful judge would rate 4 out of 5 for correctness, as high as possible.",
    "The user asks a question and the assistant gives an answer. system user assistant\n\n",
    "New Zealand was founded in 1840; the answer depends on what one calls a country.",
    "It is true that nothing here is important, said the judge to the person who asked.",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An empty thinking block before the last answer.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What stood before the answer changes once there is an answer.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'user' and not add_generation_prompt %}(answered) {% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Begin token in the template, no assistant header, blanks around the stripped content, no room for a system message.
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system messages here') }}{% endif %}{% endfor %}"
)
# No special token after the answer.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML, *, marks: bool = True, bos: bool = False, eos: bool = True):
    """A fast tokenizer. `marks` puts ChatML's into the vocabulary, `bos` makes it start every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if marks else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        additional_special_tokens=special[2:],
    )
    wrapped.chat_template = chat_template
    return wrapped


# ----- kinds of tokenizers -----

KINDS = ("bytes", "gpt2", "legacy", "first", "always", "unprefixed", "unigram", "wordpiece")


@functools.cache
def _trained(kind: str) -> str:
    """JSON of a tokenizer of some hundreds of pieces:

    bytes       byte-level BPE, line ends kept together and digits in threes, as Llama-3 and Qwen do
    gpt2        byte-level BPE, split as GPT-2 does: of the blanks before a word one is the word's
    legacy      BPE over text whose blanks are ▁, no pre-tokenizer, a ▁ before every piece of text (Llama-2)
    first       Metaspace, a ▁ before the text's beginning alone
    always      Metaspace, a ▁ before every piece
    unprefixed  BPE over text whose blanks are ▁, nothing before it (Gemma)
    unigram     Unigram over Metaspace
    wordpiece   WordPiece, lower-cased
    """
    special = ["<unk>", "<s>", "</s>"]
    lines = [*CORPUS, " ".join(CORPUS).title(), "\n\n".join(CORPUS), "a (b) c: d. 12 345 ] [ ] /INST"]
    if kind in ("bytes", "gpt2"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "bytes":
            pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )  # fmt: skip
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind in ("legacy", "unprefixed"):
            blanks = [normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = blanks[0]
            lines = [f" {word}" for line in lines for word in line.split(" ")]  # pieces do not span words
            strip = [decoders.Strip(" ", 1, 0)] if kind == "legacy" else []
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
            tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind)])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *alphabet], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *blanks])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # a byte's piece is no token of its own
    return json.dumps(content)


def family_tokenizer(family: Family, kind: str | None = None) -> PreTrainedTokenizerFast:
    """A family's tokenizer, or another kind under its template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind or family.kind)), unk_token="<unk>", bos_token=family.bos,
        eos_token="</s>",
    )  # fmt: skip
    marks = [AddedToken(text, special=True, normalized=False, rstrip=family.swallows) for text in family.special]
    wrapped.add_special_tokens({"additional_special_tokens": marks})
    wrapped.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    wrapped.eos_token = family.eos
    wrapped.chat_template = family.template
    return wrapped

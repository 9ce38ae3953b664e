"""Loads a tokenizer by name, with an error that says which one and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amopo_fast import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer, without remote code.

    Args:
        name: folder or Hub name of a tokenizer or a model.

    Raises:
        ValueError: names the tokenizer that cannot be loaded.
    """
    from transformers import AutoTokenizer

    hub.prefer_cache_if_unreachable(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        text = " ".join(str(error).split())[:300]
        remedy = hub.remedy(name) or f"{text}; give a folder with tokenizer.json, or a Hub name"
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {remedy}") from None

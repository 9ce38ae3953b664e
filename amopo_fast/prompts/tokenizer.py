"""Loads a tokenizer by name, with the model's own chat template and an error that says what to do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from amopo_fast import hub
from amopo_fast.errors import of_a_library
from amopo_fast.prompts.chat import fallback_template
from amopo_fast.prompts.template import change_templates, without_dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer, without remote code, with the chat template that its model came with: without the prefix of a
    trained folder, and ChatML where there is none.

    Args:
        name: folder or Hub name of a tokenizer or a model.

    Raises:
        ValueError: names the tokenizer that cannot be loaded.
    """
    from transformers import AutoTokenizer

    hub.prefer_cache_if_unreachable(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("Xq7")  # some values of tokenizer_config.json are looked at here
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        remedy = hub.remedy(name) or f"{of_a_library(error)}; give a folder with tokenizer.json, or a Hub name"
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {remedy}") from None
    require_vocabulary(tokenizer, name)
    if tokenizer.chat_template is None:
        logger.warning("tokenizer %s has no chat template: prompts are written in ChatML, which is saved with it", name)
        tokenizer.chat_template = fallback_template(tokenizer)
        return tokenizer
    return change_templates(tokenizer, without_dimensions)


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
    """Raises ValueError for the empty vocabulary that transformers gives a folder without tokenizer.json."""
    if not tokenizer("Xq7", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{f'{name}: ' if name else ''}the tokenizer makes no tokens of 'Xq7': its vocabulary is empty, as where a "
            "model folder has no tokenizer.json; save the tokenizer beside the model, or name it with "
            "tokenizer_name_or_path"
        )

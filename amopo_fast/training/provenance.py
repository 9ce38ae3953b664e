"""What a run adds to its recipe: objective, base model, tokenizer and versions."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from typing import TYPE_CHECKING

from torch import nn

from amopo_fast import __version__
from amopo_fast.models.architecture import causal_lm
from amopo_fast.models.saving import weights_digest
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.training.objective import objective_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from amopo_fast.training.config import AMoPOConfig

PACKAGES = ("torch", "transformers", "triton", "peft", "tokenizers")


def describe_run(
    recipe: Recipe, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, args: AMoPOConfig
) -> Recipe:
    """The recipe of a run that trains `model`, before its first step."""
    objective = objective_of(args)
    config = causal_lm(model).config
    base = {
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "weights": weights_digest(model),
    }
    return dataclasses.replace(
        recipe,
        objective={"name": type(objective).__name__.lower(), **dataclasses.asdict(objective)},
        base_model=base,
        tokenizer={} if tokenizer is None else {"name": tokenizer.name_or_path, "digest": tokenizer_digest(tokenizer)},
        versions={"amopo-fast": __version__, **{name: version for name in PACKAGES if (version := _version(name))}},
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of a fast tokenizer's vocabulary and rules, without its chat template."""
    text = tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

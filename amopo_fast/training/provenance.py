"""What a run adds to its recipe: objective, base model, tokenizer and versions."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
from typing import TYPE_CHECKING

from torch import nn

from amopo_fast import __version__
from amopo_fast.models.architecture import causal_lm
from amopo_fast.models.saving import check_tokenizer_reloads, prepare_generation
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.template import change_templates
from amopo_fast.training.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "triton", "peft", "tokenizers")


def describe_run(
    recipe: Recipe, model: nn.Module, weights: str, tokenizer: PreTrainedTokenizerBase | None, objective: Objective
) -> Recipe:
    """The recipe of a run that trains `model`, before its first step; weights: the digest of it."""
    config = causal_lm(model).config
    base = {
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "weights": weights,
    }
    return dataclasses.replace(
        recipe,
        objective=objective_entry(objective),
        base_model=base,
        tokenizer={} if tokenizer is None else {"name": tokenizer.name_or_path, "digest": tokenizer_digest(tokenizer)},
        versions={"amopo-fast": __version__, **{name: version for name in PACKAGES if (version := _version(name))}},
    )


def objective_entry(objective: Objective) -> dict:
    """A recipe's "objective"."""
    return {"name": type(objective).__name__.lower(), **dataclasses.asdict(objective)}


def prepare_serving(
    recipe: Recipe, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer to save, which asks for the recipe's dimensions; the model's generation config is made to stop at
    the end of a trained response.

    Raises:
        OptionError: what would only fail after training: a generation config that cannot be saved, a tokenizer that
            comes back as another.
    """
    for line in prepare_generation(model, recipe.end_token["id"]):
        logger.warning(line)
    if tokenizer is None:
        return None
    check_tokenizer_reloads(tokenizer, model, (recipe.wording.score, recipe.wording.no_object))
    return change_templates(tokenizer, recipe.served)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of a fast tokenizer's vocabulary and rules, without its chat template."""
    text = tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

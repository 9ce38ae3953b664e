"""Answers of a model that was asked for a dimension: batches of prompts through transformers' generate."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amopo_fast.data.pair import PLAIN
from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.errors import ModelError, OptionError, of_a_library
from amopo_fast.models.loading import load_trained, tokenizer_folder
from amopo_fast.prompts.recipe import RECIPE_FILE, Recipe, recipe_of
from amopo_fast.prompts.template import change_templates, prompt_of
from amopo_fast.prompts.tokenizer import load_tokenizer
from amopo_fast.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation import BaseStreamer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What is asked for: scores by dimension; none is the instruction that names all dimensions, or with `plain` the
    user's text alone. A dimension without a score, such as no_object, has None."""

    scores: Mapping[str, float | None]
    plain: bool = False

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Target:
        """From "helpfulness=5", "brevity=2", "no_object" or "none".

        Raises:
            OptionError: not of this form, twice the same, or "none" beside others.
        """
        scores: dict[str, float | None] = {}
        for text in texts:
            name, separator, value = text.partition("=")
            name = name.strip()
            if not name or name in scores:
                raise OptionError(f"target {text!r}: write DIMENSION=SCORE, each dimension once", "target")
            try:
                scores[name] = float(value) if separator else None
            except ValueError:
                raise OptionError(f"target {text!r}: {value!r} is no score; write DIMENSION=SCORE", "target") from None
        if PLAIN in scores and (len(scores) > 1 or scores[PLAIN] is not None):
            raise OptionError(f"target {PLAIN!r} asks for nothing: leave the others out", "target")
        return cls({}, plain=True) if PLAIN in scores else cls(scores)

    def require(self, recipe: Recipe) -> None:
        """Raises OptionError where a model with this recipe cannot be asked for it."""
        low, high = recipe.score_range
        for name, score in self.scores.items():
            if name not in recipe.dimensions:
                choices = ", ".join((*recipe.dimensions, PLAIN))
                raise OptionError(f"target: unknown dimension {name}: choose one of {choices}", "target")
            if name == NO_OBJECT and score is not None:
                raise OptionError(f"target: dimension {name} takes no score", "target")
            if name != NO_OBJECT and (score is None or not low <= score <= high):
                found = "none" if score is None else f"{score:g}"
                raise OptionError(f"target: dimension {name} needs a score from {low:g} to {high:g}, found {found}",
                                  "target")  # fmt: skip

    @property
    def template_arguments(self) -> dict[str, Any]:
        """As the chat template takes them: `dimension` and `score`, or `scores`."""
        if self.plain:
            return {"dimension": PLAIN}
        if len(self.scores) > 1:
            return {"scores": dict(self.scores)}
        return dict(zip(("dimension", "score"), next(iter(self.scores.items()), ()), strict=False))

    def __str__(self) -> str:
        if self.plain:
            return "plain"
        return ", ".join(n if s is None else f"{n}={s:g}" for n, s in self.scores.items()) or "all dimensions"


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer, whose template asks for the recipe's dimensions."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None

    @classmethod
    def load(
        cls, name: str, *, dtype: str = "auto", device: str | None = None, recipe: Recipe | None = None
    ) -> TrainedModel:
        """
        Args:
            name: folder of a trained model, an adapter or a run, or a Hub name. dtype, device: as `load_trained`.
            recipe: for a model without one, such as the base model of another.

        Raises:
            ValueError: it cannot be loaded, or no recipe says how it is asked.
        """
        own = recipe_of(name)
        if own is None and recipe is None:
            raise ValueError(
                f"{name} has no {RECIPE_FILE}: it was not trained by amopo-fast, so nothing says how it is asked for a "
                "dimension; name a folder that `amopo-fast train` wrote"
            )
        if own is None:
            logger.warning("%s has no recipe of its own: it is asked as the other model was trained", name)
        _check_generation_config(Path(name) / "generation_config.json")
        chosen = own or recipe
        tokenizer = change_templates(load_tokenizer(tokenizer_folder(name)), chosen.served)
        return cls(load_trained(name, dtype=dtype, device=device), tokenizer, chosen)

    def prompt(self, messages: Sequence[Mapping[str, Any]], target: Target) -> list[int]:
        """Token ids of a conversation up to the answer. Raises ValueError as `prompt_of`."""
        return prompt_of(self.tokenizer, messages, **target.template_arguments)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, with transformers' names; None is the model's own generation_config's."""

    max_new_tokens: int = 512
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 42

    def __post_init__(self):
        for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_p", 0), ("top_k", 0)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise OptionError(f"{name}={value} must be {low} or more", name)
        if self.top_p is not None and self.top_p > 1:
            raise OptionError(f"top_p={self.top_p} must be at most 1", "top_p")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise OptionError(f"repetition_penalty={self.repetition_penalty} must be positive", "repetition_penalty")

    def arguments(self) -> dict[str, Any]:
        """For `model.generate`. A temperature of 0 is greedy; one above it samples unless do_sample says no."""
        given = {name: value for name, value in vars(self).items() if name != "seed" and value is not None}
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.do_sample is None and (self.temperature is not None or self.top_p is not None):
            given["do_sample"] = True
        return given


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda count: None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """One answer to each prompt, without special tokens, in the prompts' order.

    Args:
        model: a causal LM on its device; an adapter over one too.
        prompts: token ids, as `prompt_of` makes them.
        batch_size: prompts at a time, longest first, padded on the left.
        done: called with the number of answers that have come.
        streamer: of transformers, for a single prompt.

    Raises:
        ModelError: it cannot generate; names the file that may be why.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), padding or 0, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.random.fork_rng():
                torch.manual_seed(sampling.seed + begin)
                out = _generated(
                    model, input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=padding,
                    streamer=streamer, num_return_sequences=1, **sampling.arguments(),
                )  # fmt: skip
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
            done(len(batch))
    finally:
        model.train(was_training)
    return answers


def _check_generation_config(path: Path) -> None:
    """Raises ModelError for one that transformers would leave unread without a word."""
    if path.exists():
        try:
            json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read ({error}): copy it again, or remove it") from None


def _generated(model: nn.Module, **arguments: Any) -> torch.Tensor:
    """model.generate, which fails in many ways where the model's own generation_config cannot be."""
    try:
        return model.generate(**arguments)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        name = getattr(model.config, "_name_or_path", "") or "the model"
        own = ", ".join(key for key in model.generation_config.to_diff_dict() if not key.startswith(("_", "transf")))
        raise ModelError(
            f"{name} cannot generate: {of_a_library(error)}. Its generation_config.json may be why, which sets "
            f"{own or 'nothing'}: correct the file, or remove it"
        ) from error

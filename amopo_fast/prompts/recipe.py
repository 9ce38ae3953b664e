"""amopo_recipe.json: what a trained model knows about itself, in every folder that a run writes.

Whatever is needed to prompt it as it was trained (dimensions, wording, order, range of scores, options of the chat
template, end token) and what it was trained from and on. docs/recipe.md documents the keys; SCHEMA is their schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from amopo_fast.data.config import DataConfig
from amopo_fast.prompts.template import with_dimensions
from amopo_fast.prompts.wording import Wording

RECIPE_FILE = "amopo_recipe.json"
VERSION = 1

_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": RECIPE_FILE,
    "type": "object",
    "required": ["version", "dimensions", "wording", "prompt_order", "score_range", "max_length", "end_token"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": VERSION},
        "dimensions": {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True},
        "wording": {
            "type": "object",
            "required": ["score", "no_object", "names", "definitions"],
            "additionalProperties": False,
            "properties": {"score": _TEXT, "no_object": _TEXT, "names": _TEXTS, "definitions": _TEXTS},
        },
        "prompt_order": {"enum": ["dimension_first", "dimension_last"]},
        "score_range": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "max_length": {"type": "integer", "minimum": 1},
        "end_token": {
            "type": "object",
            "required": ["id", "text"],
            "additionalProperties": False,
            "properties": {"id": {"type": "integer", "minimum": 0}, "text": _TEXT},
        },
        "prompt_options": {"type": "object"},
        "objective": {"type": "object"},
        "base_model": {"type": "object"},
        "tokenizer": {"type": "object"},
        "data": {"type": "object"},
        "versions": _TEXTS,
    },
}


@dataclass(frozen=True)
class Recipe:
    """What a trained model knows about itself.

    Attributes:
        dimensions: the K names, in their order. wording: of their instructions, in full.
        prompt_order: "dimension_first" or "dimension_last".
        score_range: lowest and highest score that an instruction can name.
        max_length: tokens of a sequence in training. end_token: {"id", "text"}, what ends an answer.
        prompt_options: DataConfig's further options of the prompts by name: chat_template_kwargs, template_date,
            reasoning, truncated_responses.
        objective: its name and hyper-parameters.
        base_model: {"name", "revision", "weights"}: what was trained, its Hub revision, a digest of its weights.
        tokenizer: {"name", "digest"}.
        data: {"pairs", "tokens", "scores", "sources"}: count, digests of all token ids and differences of scores, and
            what became of every source's records.
        versions: of the packages that trained it.
    """

    dimensions: tuple[str, ...]
    wording: Wording
    prompt_order: str
    score_range: tuple[float, float]
    max_length: int
    end_token: Mapping[str, Any]
    prompt_options: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    base_model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        content = {"version": VERSION, **vars(self), "wording": vars(self.wording)}
        return json.dumps(content, indent=1, ensure_ascii=False, default=list) + "\n"

    def write(self, folder: str | Path) -> None:
        (Path(folder) / RECIPE_FILE).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Recipe | None:
        """The recipe of a folder; None where it has none.

        Raises:
            ValueError: it has one that this version cannot read; names the file and the key.
        """
        path = Path(folder) / RECIPE_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a recipe: {error}; copy the file from the run again") from None
        problem = _problem_of(content)
        if problem:
            raise ValueError(f"{path}: {problem}; copy the file from the run again, or use the version that wrote it")
        values = {key: value for key, value in content.items() if key != "version"}
        values |= {"dimensions": tuple(content["dimensions"]), "score_range": tuple(content["score_range"])}
        return cls(**{**values, "wording": Wording(**content["wording"])})

    def served(self, template: str) -> str:
        """A chat template that asks for this recipe's dimensions."""
        return with_dimensions(
            template, dimensions=self.dimensions, wording=self.wording, order=self.prompt_order,
            score_range=self.score_range, chat_template_kwargs=self.prompt_options.get("chat_template_kwargs"),
            date=self.prompt_options.get("template_date"),
        )  # fmt: skip


def recipe_of_prompts(builder: Any, data: Mapping[str, Any]) -> Recipe:
    """The recipe of a run's prompts: what its PromptBuilder puts into them; the run adds what it trains."""
    end = {"id": int(builder.end_id), "text": builder.tokenizer.convert_ids_to_tokens(int(builder.end_id))}
    low, high = map(float, builder.score_range)
    return Recipe(
        builder.dimensions, builder.wording, builder.order, (low, high), builder.max_length, end, builder.options,
        data=data,
    )  # fmt: skip


def recipe_of(name: str | Path) -> Recipe | None:
    """The recipe of a model's folder, or of its run's for a checkpoint without one; None for a base model.

    Raises ValueError as `Recipe.read`.
    """
    folder = Path(name)
    return Recipe.read(folder) or Recipe.read(folder.parent) if folder.is_dir() else None


def as_trained(
    config: DataConfig, recipe: Recipe, given: Set[str]
) -> tuple[DataConfig, Wording, list[str]]:
    """(the configuration of the prompts that a model was trained with, their wording, what is asked for differently).

    Args:
        given: names of the options that the user set: they hold, and each that differs is a line of the last part.
    """
    trained = {
        "dimensions": list(recipe.dimensions), "prompt_order": recipe.prompt_order, "score_min": recipe.score_range[0],
        "score_max": recipe.score_range[1], "max_length": recipe.max_length, **recipe.prompt_options,
    }  # fmt: skip
    if given & {"score_min", "score_max"}:  # one range: both are the user's
        given = given | {"score_min", "score_max"}
    notes = [
        f"{name} is {getattr(config, name)!r} as asked, {value!r} in training"
        for name, value in trained.items()
        if name in given and getattr(config, name) != value
    ]
    own = {name: value for name, value in trained.items() if name not in given}
    wording = recipe.wording
    if "prompt_template" in given:
        asked = Wording.load(config.prompt_template)
        notes += ["prompt_template is another wording than in training"] if asked != wording else []
        wording = asked
    return replace(config, **own), wording, notes


def _problem_of(content: Any) -> str:
    """What is wrong with a recipe's content by SCHEMA, or ""."""
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content))
    if error is None:
        return ""
    place = ".".join(map(str, error.absolute_path))
    return f"key {place!r}: {error.message[:200]}" if place else error.message[:200]

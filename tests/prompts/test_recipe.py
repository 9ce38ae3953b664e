"""A recipe is read back as it was written, matches its published schema, and a damaged one is named."""

import json
from dataclasses import replace

import pytest

from amopo_fast.data.config import DataConfig
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.recipe import RECIPE_FILE, SCHEMA, Recipe, as_trained, recipe_of, recipe_of_prompts


@pytest.fixture
def recipe():
    pytest.importorskip("jsonschema")  # which every reading asks
    builder = PromptBuilder(demo_tokenizer(), ["no_object", "helpfulness"], score_range=(1, 7), order="dimension_last")
    made = recipe_of_prompts(builder, {"pairs": 3, "sources": {"é.json": "3 pairs"}})
    return replace(made, objective={"name": "amopo", "beta": 0.8}, versions={"torch": "2.13"})


def test_written_read_and_valid(recipe, tmp_path):
    import jsonschema

    recipe.write(tmp_path)
    assert Recipe.read(tmp_path) == recipe
    jsonschema.validate(json.loads((tmp_path / RECIPE_FILE).read_text()), SCHEMA)
    assert recipe.end_token == {"id": demo_tokenizer().eos_token_id, "text": "<|im_end|>"}
    (tmp_path / "checkpoint-3").mkdir()
    assert recipe_of(tmp_path / "checkpoint-3") == recipe  # of a checkpoint without its own: its run's
    assert recipe_of("org/model") is None


DAMAGES = [
    ("version", 2), ("dimensions", []), ("dimensions", ["a", "a"]), ("dimensions", "a"), ("wording", {}),
    ("wording", None), ("prompt_order", "random"), ("score_range", [1]), ("score_range", ["a", "b"]), ("max_length", 0),
    ("max_length", 1.5), ("end_token", {"id": 1}), ("end_token", {"id": -1, "text": ""}), ("objective", 3),
    ("extra", 1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DAMAGES, ids=[f"{key}={value}" for key, value in DAMAGES])
def test_a_damaged_recipe_names_file_and_key(recipe, tmp_path, key, value):
    content = json.loads(recipe.to_json())
    (tmp_path / RECIPE_FILE).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=f"{RECIPE_FILE}: .*{key}"):
        Recipe.read(tmp_path)


def test_a_recipe_that_is_cut_off_or_lacks_a_key(recipe, tmp_path):
    path = tmp_path / RECIPE_FILE
    path.write_text(recipe.to_json()[:100])
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.read(tmp_path)
    content = json.loads(recipe.to_json())
    del content["end_token"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'end_token' is a required property"):
        Recipe.read(tmp_path)


def test_prompts_are_those_of_training_but_for_what_the_user_sets(recipe, tmp_path):
    config, wording, notes = as_trained(DataConfig(), recipe, frozenset())
    assert config.dimensions == ["no_object", "helpfulness"] and config.prompt_order == "dimension_last"
    assert (config.score_min, config.score_max) == (1, 7) and wording == recipe.wording and not notes
    asked = DataConfig(dimensions=["helpfulness"], score_min=0, score_max=5, prompt_order="dimension_last")
    config, _, notes = as_trained(asked, recipe, frozenset({"dimensions", "score_min", "score_max", "prompt_order"}))
    assert config.dimensions == ["helpfulness"] and (config.score_min, config.score_max) == (0, 5)
    assert [note.split()[0] for note in notes] == ["dimensions", "score_min", "score_max"]
    template = tmp_path / "wording.yaml"
    template.write_text('score: "{score} for {dimension}"\nno_object: "all"\n')
    _, wording, notes = as_trained(DataConfig(prompt_template=str(template)), recipe, frozenset({"prompt_template"}))
    assert wording.no_object == "all" and len(notes) == 1

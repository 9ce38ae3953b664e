"""Every field of DataConfig and ModelConfig changes what its name says, or is refused where nothing reads it."""

import dataclasses
import json

import pytest
import torch
import yaml
from tokenizers_for_tests import CHATML, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.data.config import DataConfig
from amopo_fast.errors import OptionError
from amopo_fast.models.config import NEEDS, ModelConfig
from amopo_fast.models.loading import add_adapter, load_shape, peft_config, quantisation_config
from amopo_fast.prompts.dataset import load_data

DIMENSIONS = ["no_object", "helpfulness", "brevity"]
# Reads the clock and a variable of its own.
TEMPLATE = "{{ strftime_now('%Y-%m-%d') }}{% if loud %}!{% endif %}" + CHATML
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def record(number, **changes):
    chosen = {"response": f"Answer {number} " + "and so on " * (number % 3), "helpfulness": 3, "brevity": 2}
    rejected = {"response": "No.", "helpfulness": 2, "brevity": 2 - number % 2}
    return {"prompt": f"Question {number}?", "chosen": {**chosen, **changes}, "rejected": rejected}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    good = [record(i) for i in range(12)]
    missing = [{**record(i), "chosen": {"response": f"A {i}", "helpfulness": 4}} for i in range(2)]
    for name, rows in {"good": good, "other": good[:5], "missing": good[:2] + missing,
                       "bad": [*good[:3], {"prompt": ""}]}.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))
    wording = {"score": "Be {score} good at {dimension}.", "no_object": "Be good at {dimensions}."}
    (folder / "wording.yaml").write_text(yaml.safe_dump(wording))
    return folder


# option: (value, other options on both sides); a value in capitals is a file. None for one that is refused without it.
ACTS = {
    "train_data": (["OTHER"], {}),
    "eval_data": (["OTHER"], {}),
    "eval_share": (0.5, {}),
    "dimensions": (["no_object", "helpfulness"], {}),
    "score_min": (1, {"score_max": 5}),
    "score_max": (9, {"score_min": 0}),
    "prompt_order": ("dimension_last", {}),
    "prompt_template": ("WORDING", {}),
    "chat_template_kwargs": ({"loud": True}, {}),
    "template_date": ("2020-02-02", {}),
    "reasoning": ("close", {"template": OPENS}),
    "max_length": (110, {}),
    "truncated_responses": ("drop", {"max_length": 110}),
    "on_bad_record": ("skip", {"train_data": ["BAD"]}),
    "missing_scores": ("absent", {"train_data": ["MISSING"]}),
    "tied_dimensions": ("drop", {}),
    "streaming": (True, {}),
}


def observe(files, folder, template=TEMPLATE, **options):
    """What a run would be trained with; an error's text where there is none."""
    named = {"OTHER": "other.json", "WORDING": "wording.yaml", "BAD": "bad.json", "MISSING": "missing.json"}

    def path(value):
        if isinstance(value, list):
            return [path(each) for each in value]
        return str(files / named[value]) if isinstance(value, str) and value in named else value

    options = {"train_data": [str(files / "good.json")], "dimensions": DIMENSIONS, "template_date": "2020-01-01",
               **{name: path(value) for name, value in options.items()}}  # fmt: skip
    try:
        data = load_data(DataConfig(**options), make_tokenizer(template), seed=1, folder=folder)
    except ValueError as error:
        return str(error)
    sets = {"train": data.train, **data.evals}
    found = {name: [(*map(str, pair.prompts), str(pair.chosen), str(pair.rejected)) for pair in pairs]
             for name, pairs in sets.items()}  # fmt: skip
    return found, sorted(each.name for each in folder.rglob("*") if each.is_file())


def test_the_table_holds_every_field():
    assert set(ACTS) == {each.name for each in dataclasses.fields(DataConfig)}


@pytest.mark.parametrize("option", ACTS)
def test_an_option_of_the_data_changes_what_is_trained(option, files, tmp_path):
    value, beside = ACTS[option]
    before = observe(files, tmp_path / "before", **beside)
    after = observe(files, tmp_path / "after", **{**beside, option: value})
    assert before != after and not isinstance(after, str), after
    if option in ("reasoning", "on_bad_record", "missing_scores"):
        assert isinstance(before, str)


def tiny_model():
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1)
    )  # fmt: skip


def adapted(**options):
    model = tiny_model()
    adapter = peft_config(ModelConfig("x", use_peft=True, **options))
    torch.manual_seed(0)
    model = add_adapter(model, adapter)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return str(next(iter(model.peft_config.values())).to_dict()), trained


ADAPTERS = {"lora_r": 4, "lora_alpha": 5, "lora_dropout": 0.5, "lora_target_modules": ["q_proj"], "use_rslora": True,
            "use_dora": True}  # fmt: skip
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}
ELSEWHERE = {  # where a test shows what it does
    "model_name_or_path": "every run", "tokenizer_name_or_path": "tests/cli", "use_peft": "tests/survival",
    "random_weights": "tests/training/test_loading.py", "config_overrides": "below",
}  # fmt: skip


def test_every_option_of_the_model_is_shown_somewhere():
    assert {*ADAPTERS, *FOUR_BITS, *ELSEWHERE} == {each.name for each in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("option", ADAPTERS)
def test_an_option_of_the_adapter_changes_it(option):
    assert adapted(**{option: ADAPTERS[option]}) != adapted()


def test_options_of_four_bits_change_how_weights_are_quantised():
    pytest.importorskip("bitsandbytes")
    base = {"use_peft": True, "load_in_4bit": True}
    assert quantisation_config(ModelConfig("x", use_peft=True), torch.bfloat16) is None
    plain = quantisation_config(ModelConfig("x", **base), torch.bfloat16).to_dict()
    for option in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
        changed = ModelConfig("x", **base, **{option: FOUR_BITS[option]})
        assert quantisation_config(changed, torch.bfloat16).to_dict() != plain


def test_overrides_change_the_models_shape(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    shape = load_shape(ModelConfig(str(tmp_path), random_weights=True, config_overrides="num_hidden_layers=3"))
    assert shape.num_hidden_layers == 3 != load_shape(ModelConfig(str(tmp_path))).num_hidden_layers


@pytest.mark.parametrize("need", NEEDS, ids=[each.option for each in NEEDS])
def test_an_option_of_the_model_without_its_condition_is_refused(need):
    value = {**ADAPTERS, **FOUR_BITS, "config_overrides": "num_hidden_layers=3"}[need.option]
    with pytest.raises(OptionError, match=f"{need.option}=.* has no effect without {need.other}") as caught:
        ModelConfig("x", **{need.option: value})
    assert caught.value.option == need.option

"""Nothing that a command is given runs code: pickles, code beside a model, templates, YAML. Each payload leaves a file
where it runs, and is shown to do so where it is read carelessly."""

import json
import pickle
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from demo_folder import demo_folder
from payloads import Evil

from amopo_fast.cli import main
from amopo_fast.demo.data import DIMENSIONS, TRAIN_FILE

SHOW = ("show", str(TRAIN_FILE), "--dimensions", *DIMENSIONS, "--record", "0", "--model_name_or_path", "{folder}")
GENERATE = ("generate", "{folder}", "--prompt", "Who?", "--max_new_tokens", "1", "--device", "cpu")
CONFIGURED = ("validate", "--config", "{folder}/given")
WORDED = ("validate", str(TRAIN_FILE), "--dimensions", *DIMENSIONS, "--prompt_template", "{folder}/given.yaml")
STEER = ("steer", "{folder}", "--prompts", str(TRAIN_FILE), "--judge_template", "{folder}/given", "--judge",
         "http://localhost:1/v1", "--output_dir", "{folder}/out", "--max_new_tokens", "1")  # fmt: skip


def pickled(canary):
    return pickle.dumps(Evil(canary)), pickle.loads


def saved(canary):
    """By torch.save, as trained weights once were."""

    def load(content):
        torch.load(canary.with_name("content"), weights_only=False)

    torch.save(Evil(canary), canary.with_name("content"))
    return canary.with_name("content").read_bytes(), load


def python(canary):
    code = f"open({str(canary)!r}, 'w')\nclass Own: pass\n"
    return code.encode(), lambda content: exec(content, {})


def template(canary):
    text = f"{{{{ cycler.__init__.__globals__.__builtins__.open({str(canary)!r}, 'w') }}}}"
    return text.encode(), lambda content: jinja2.Environment().from_string(content.decode()).render()


def tag(canary):
    text = f'beta: !!python/object/apply:builtins.open ["{canary}", "w"]'
    return text.encode(), yaml.unsafe_load


def written(content, folder, name):
    (folder / name).write_bytes(content)


def in_place_of_weights(content, folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


def as_adapter(content, folder, name):
    base = Path(shutil.copytree(folder, folder.with_name("base")))
    for path in folder.iterdir():
        path.unlink()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    (folder / name).write_bytes(content)


def with_code(classes, file):
    """`file` names a class of own.py for each of `classes`."""

    def place(content, folder, name):
        (folder / name).write_bytes(content)
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, "auto_map": dict.fromkeys(classes, "own.Own")}))

    return place


def of_an_unknown_type(content, folder, name):
    with_code(["AutoConfig", "AutoModelForCausalLM"], "config.json")(content, folder, name)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own"}))


# (payload, where it is put, as which file, the command that is given the folder)
CASES = {
    "pickled weights": (pickled, in_place_of_weights, "pytorch_model.bin", GENERATE),
    "saved weights": (saved, in_place_of_weights, "pytorch_model.bin", GENERATE),
    "saved arguments beside weights": (saved, written, "training_args.bin", GENERATE),
    "a saved adapter": (saved, as_adapter, "adapter_model.bin", GENERATE),
    "a saved adapter that is merged": (saved, as_adapter, "adapter_model.bin", ("merge", "{folder}", "{folder}/out")),
    "code of a model": (python, with_code(["AutoModelForCausalLM"], "config.json"), "own.py", GENERATE),
    "code of an unknown model": (python, of_an_unknown_type, "own.py", GENERATE),
    "code of an unknown model's shape": (python, of_an_unknown_type, "own.py", ("estimate", "{folder}")),
    "code of a tokenizer": (python, with_code(["AutoTokenizer"], "tokenizer_config.json"), "own.py", SHOW),
    "code for generation": (python, written, "custom_generate/generate.py", GENERATE),
    "a chat template": (template, written, "chat_template.jinja", SHOW),
    "a chat template that generates": (template, written, "chat_template.jinja", GENERATE),
    "a judge's template": (template, written, "given", STEER),
    "a configuration": (tag, written, "given", CONFIGURED),
    "a wording": (tag, written, "given.yaml", WORDED),
    "a pickle for a configuration": (pickled, written, "given", CONFIGURED),
    "a pickle for data": (pickled, written, "given.parquet", ("validate", "{folder}/given.parquet")),
    "a module for a judge's template": (python, written, "given", STEER),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return demo_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_no_code_runs(name, model_folder, tmp_path, capsys):
    payload, put, file, command = CASES[name]
    canary, folder = tmp_path / "owned", Path(shutil.copytree(model_folder, tmp_path / "given"))
    content, careless = payload(canary)
    (folder / file).parent.mkdir(exist_ok=True)
    put(content, folder, file)
    code = main([word.format(folder=folder) for word in command])
    assert not canary.exists() and "Traceback" not in capsys.readouterr().err
    assert code in (0, 1, 2)
    careless(content)
    assert canary.exists(), "the payload does nothing"

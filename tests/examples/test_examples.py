"""Every example's configuration, as it stands and run in tiny form on a CPU; the configuration page is current."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from demo_folder import demo_folder

from amopo_fast.cli import main
from amopo_fast.cli.options import parse_options
from amopo_fast.data.config import DataConfig
from amopo_fast.data.sources.spec import parse_sources
from amopo_fast.demo.data import HELDOUT_FILE
from amopo_fast.models.config import ModelConfig
from amopo_fast.training.config import AMoPOConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    demo_folder(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:60]))
    attributes = {"correctness": 2, "coherence": 4, "complexity": 1, "verbosity": 1}
    scores, preferences, ultra = [], [], []
    for i in range(8):
        prompt, sides = f"Where is item {i}?", (f"Item {i} is here.", "No idea.")
        scores += [{"prompt": prompt, "response": text, "helpfulness": h, **attributes}
                   for text, h in zip(sides, (4, 1), strict=True)]  # fmt: skip
        preferences.append({"split": "train" if i < 6 else "validation", "prompt": prompt, "response_1": sides[0],
                            "response_2": sides[1], "preference_strength": -2})  # fmt: skip
        rating = {a: {"Rating": "4"} for a in ("helpfulness", "honesty", "instruction_following", "truthfulness")}
        completions = [{"response": text, "overall_score": score, "annotations": rating}
                       for text, score in zip(sides, (8.0, 3.0), strict=True)]  # fmt: skip
        ultra.append({"instruction": prompt, "completions": completions})
    for name, rows in (("scores", scores), ("preferences", preferences), ("ultra", ultra)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def local(source, folder):
    """The same source, on the small files in the schema of its own."""
    options = {key: value for key, value in vars(source).items() if value not in ("", None)}
    if source.path == "nvidia/HelpSteer2":
        options |= {"path": str(folder / "preferences.jsonl"), "scores": str(folder / "scores.jsonl")}
        del options["data_dir"]
    elif source.path == "openbmb/UltraFeedback":
        options["path"] = str(folder / "ultra.jsonl")
    else:
        options["path"] = str(folder / "pairs.jsonl")
    return options


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs_in_tiny_form(path, workspace, tmp_path, capsys):
    content = yaml.safe_load(path.read_text())
    data, _, _, _ = parse_options("train", (DataConfig, ModelConfig, AMoPOConfig), ["--config", str(path), "--use_cpu"])
    small = {
        **content,
        "model_name_or_path": str(workspace / "model"),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "max_steps": 2,
        "pairs_per_step": 2,
        "max_length": 256,
        "save_strategy": "no",
        "train_data": [local(source, workspace) for source in parse_sources(data.train_data)],
    }
    if "eval_data" in content:
        small["eval_data"] = [local(source, workspace) for source in parse_sources(data.eval_data)]
    if "eval_share" in content:
        small["eval_share"] = 0.3  # of a few prompts
    small.pop("save_steps", None)
    if content.get("eval_strategy") == "steps":
        small["eval_steps"] = 2
    if content.get("load_in_4bit"):
        small["load_in_4bit"] = False  # its kernels are for GPUs
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small))
    assert main(["train", "--config", str(config)]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    held_out = [line for line in lines if "eval_accuracy/mean" in line]
    assert bool(held_out) == ("eval_strategy" in content)
    adapter = (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert adapter == bool(content.get("use_peft"))


def test_the_list_of_examples_is_complete():
    text = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES and all(f"[{path.name}]({path.name})" in text for path in EXAMPLES)


def test_the_configuration_page_is_current():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/make_configuration.py`"

"""What README and pages show: code runs, commands have options that exist, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from demo_folder import demo_folder

from amopo_fast.cli import main
from amopo_fast.data.sources.spec import parse_sources
from amopo_fast.demo.data import HELDOUT_FILE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").glob("*.md"))]  # fmt: skip


def blocks(page):
    """The indented blocks of a page, without their indent."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", page.read_text(), re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip("\n") for block in found if block.strip()]


def commands():
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text())
        for line in re.findall(r"(?:^ {4}|`)(amopo-fast [^`\n]*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if len(words) > 2 and "..." not in words and not any(word.split("/")[-1].isupper() for word in words):
                yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:])[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_has_options_that_exist(words, tmp_path, monkeypatch, capsys):
    for name in ("pairs.json", "pairs.jsonl", "heldout.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "run.yaml").write_text("model_name_or_path: no/such\ntrain_data: pairs.json\noutput_dir: run\n")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")  # of a page that pushes
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1  # the files are empty and the models are not here
    error = capsys.readouterr().err
    assert not re.search(r"unknown (option|key)|argument --|invalid choice|unrecognized", error), error


def test_the_kernels_snippet_of_the_readme_runs():
    [code] = [block for block in blocks(ROOT / "README.md") if "import linear_logps" in block]
    torch.manual_seed(0)
    names = {
        "hidden": torch.randn(7, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 19),
        "labels": torch.randint(19, (7,)),
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32),
    }
    exec(code, names)
    expected = names["lm_head"](names["hidden"]).log_softmax(-1).gather(1, names["labels"][:, None])[:, 0]
    bias_free = (names["hidden"] @ names["lm_head"].weight.T).log_softmax(-1).gather(1, names["labels"][:, None])[:, 0]
    assert torch.allclose(names["logps"], bias_free, atol=1e-5) and not torch.allclose(expected, bias_free, atol=1e-3)
    assert torch.allclose(names["stats"].logp_sum, torch.stack([bias_free[:3].sum(), bias_free[3:].sum()]), atol=1e-5)


def test_the_python_snippet_of_the_readme_trains(tmp_path, monkeypatch):
    demo_folder(tmp_path / "model")
    rows = [json.loads(line) for line in HELDOUT_FILE.read_text().splitlines()[:60]]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    [code] = [block for block in blocks(ROOT / "README.md") if "load_data(" in block]
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model"))
    code = code.replace("pairs_per_step=16", "pairs_per_step=16, max_steps=1, use_cpu=True")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 1 and len(names["data"].eval_dataset) > 0


def test_data_blocks_of_the_data_page_are_what_they_say():
    text = (ROOT / "docs" / "data.md").read_text()
    for line in re.findall(r"^ {4}((?:train|eval)_data: \{.*)$", text, re.MULTILINE):
        [(key, value)] = yaml.safe_load(line).items()
        assert parse_sources(value, named=key == "eval_data")
    parts = [part for block in blocks(ROOT / "docs" / "data.md") for part in block.split("\n\n")]
    [block] = [part for part in parts if part.startswith("train_data:\n")]
    assert [source.weight for source in parse_sources(yaml.safe_load(block)["train_data"])] == [1, 0.5]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target

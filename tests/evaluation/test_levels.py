"""Log-probs of the reference responses under each asked level, against the sequences one by one in float64."""

import json

import numpy as np
import pytest
import torch
from demo_folder import demo_folder

from amopo_fast.cli import main
from amopo_fast.data.pairs import read_pairs
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.dataset import asked_for

LEVELS = (1.0, 4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    demo_folder(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:12]))
    return folder


def reference(pair, model, builder, dimension):
    """(chosen, rejected) mean log-prob of a response's tokens, by the model's own logits."""
    tokens = builder.tokens(pair)
    prompt = tokens.prompts[DIMENSIONS.index(dimension)]
    found = []
    for response in (tokens.chosen, tokens.rejected):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(float(logps.gather(1, torch.from_numpy(response)[:, None]).mean()))
    return found


@torch.no_grad()
def test_levels_are_those_that_were_asked_for(folder, tmp_path):
    data = ["--eval_data", str(folder / "pairs.jsonl"), "--output_dir", str(tmp_path), "--dimensions", *DIMENSIONS]
    assert main(["eval", str(folder / "model"), *data, "--levels", "1,4"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["eval"]["model"]["asked"]
    assert found["levels"] == list(LEVELS) and list(found["dimensions"]) == list(DIMENSIONS[1:])
    model, builder = demo_model(0).double().eval(), PromptBuilder(demo_tokenizer(), DIMENSIONS)
    pairs, _ = read_pairs(folder / "pairs.jsonl", dimensions=DIMENSIONS)
    for name in ("helpfulness", "instruction_following"):
        expected = np.array([[reference(asked_for(pair, level), model, builder, name) for pair in pairs]
                             for level in LEVELS])  # (levels, pairs, sides)  # fmt: skip
        part = found["dimensions"][name]
        for side, key in enumerate(("logp_chosen", "logp_rejected")):
            values = [x["value"] for x in part[key]]
            assert values == pytest.approx(expected[:, :, side].mean(1), rel=1e-5)
            assert abs(values[0] - values[1]) > 1e-3
        change = (expected[1] - expected[0]) @ [1, -1]
        assert part["change"]["value"] == pytest.approx(change.mean(), rel=1e-3, abs=1e-6)
        gaps = [pair.chosen_scores[name] - pair.rejected_scores[name] for pair in pairs]
        ranks = [[(np.array(x) < v).sum() + ((np.array(x) == v).sum() + 1) / 2 for v in x] for x in (change, gaps)]
        assert part["rank_correlation"]["value"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def test_levels_out_of_range_are_refused(folder, tmp_path, capsys):
    data = ["--eval_data", str(folder / "pairs.jsonl"), "--output_dir", str(tmp_path)]
    assert main(["eval", str(folder / "model"), *data, "--levels", "1,9"]) == 2
    assert "from low to high, within 0 to 5" in capsys.readouterr().err

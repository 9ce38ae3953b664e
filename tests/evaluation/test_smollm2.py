"""A real pretrained model, SmolLM2-135M-Instruct: it answers; its first layers are trained for a step, saved, and
asked as they were trained."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from amopo_fast.cli import main
from amopo_fast.data.pairs import read_pairs
from amopo_fast.evaluation.generation import Sampling, generate
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.template import prompt_of

DIMENSIONS = ("no_object", "helpfulness", "correctness")
FRANCE = "What is the capital of France?"
PAIRS = [
    (FRANCE, ("The capital of France is Paris.", 5, 5), ("I don't know.", 1, 2)),
    ("How many legs has a spider?", ("Eight.", 4, 5), ("A spider is an insect with six legs.", 3, 1)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, request):
    sys.path.insert(0, str(request.config.rootpath / "benchmarks"))
    try:
        import smollm2
    finally:
        sys.path.pop(0)
    if smollm2.gguf_folder() is None:
        pytest.skip(f"SmolLM2's weights are not installed: {smollm2.INSTALL}")
    return smollm2.make_folder(tmp_path_factory.mktemp("smollm2") / "base")


@pytest.fixture(scope="module")
def shallow(base):
    """The model's first three of thirty layers, its whole vocabulary and its tokenizer."""
    folder = base.parent / "shallow"
    model = AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=3, dtype="auto")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(base):
    def side(response, *scores):
        return {"response": response, **dict(zip(DIMENSIONS[1:], scores, strict=True))}

    path = base.parent / "pairs.json"
    path.write_text(json.dumps([{"prompt": p, "chosen": side(*c), "rejected": side(*r)} for p, c, r in PAIRS]))
    return path


def test_the_decoded_weights_are_the_published_model(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    asked = [{"role": "user", "content": FRANCE}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # as the published card says
    [answer] = generate(model, tokenizer, [prompt], Sampling(max_new_tokens=10, temperature=0))
    assert "Paris" in answer


@pytest.mark.parametrize("options", [["--use_peft", "--learning_rate", "1e-4"], ["--learning_rate", "1e-5"]])
def test_a_step_and_the_prompts_of_training(shallow, pairs, tmp_path, options):
    arguments = [
        "train", "--model_name_or_path", str(shallow), "--train_data", str(pairs), "--dimensions", *DIMENSIONS,
        "--prompt_order", "dimension_last", "--use_cpu", "--pairs_per_step", "2", "--max_steps", "1",
        "--warmup_steps", "0", "--save_strategy", "no", "--output_dir", str(tmp_path / "run"), *options,
    ]  # fmt: skip
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [loss] = [line["loss"] for line in lines if "loss" in line]
    assert math.isfinite(loss) and loss > 0

    published, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (shallow, tmp_path / "run"))
    builder = PromptBuilder(published, DIMENSIONS, order="dimension_last")
    for pair in read_pairs(pairs, dimensions=DIMENSIONS)[0]:
        messages = [message._asdict() for message in pair.messages]
        for name, expected in zip(builder.dimensions, builder.tokens(pair).prompts, strict=True):
            score = pair.chosen_scores.get(name)
            assert prompt_of(tokenizer, messages, dimension=name, score=score) == list(expected)

    weights = tmp_path / "run" / ("adapter_model.safetensors" if "--use_peft" in options else "model.safetensors")
    saved = load_file(weights)
    if "--use_peft" in options:
        assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    else:
        before = load_file(shallow / "model.safetensors")
        assert saved.keys() == before.keys() and {x.dtype for x in saved.values()} == {torch.bfloat16}
        assert any(not torch.equal(saved[name], before[name]) for name in saved)

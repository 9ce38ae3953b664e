"""From training to an answer: what a run writes is loaded, served, merged and asked as it was trained."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from amopo_fast.cli import main
from amopo_fast.data.pairs import read_pairs
from amopo_fast.demo.data import DIMENSIONS, HELDOUT_FILE
from amopo_fast.demo.model import demo_model
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.evaluation.generation import Sampling, Target, TrainedModel, generate
from amopo_fast.judges.choose import JudgeOptions, load_judge
from amopo_fast.judges.judge import Answer
from amopo_fast.judges.template import read_score
from amopo_fast.models.merge import merge_adapter
from amopo_fast.models.saving import check_tokenizer_reloads
from amopo_fast.prompts.builder import PromptBuilder
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.template import prompt_of

QUESTION = [{"role": "user", "content": "Where is the lamp?"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A bfloat16 base model that samples; a full run and an adapter over it, with other prompts than the defaults."""
    pytest.importorskip("jsonschema")  # which reading a recipe asks
    folder = tmp_path_factory.mktemp("prompted")
    base = demo_model(0).to(torch.bfloat16)
    base.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True, eos_token_id=0)
    base.save_pretrained(folder / "base")
    demo_tokenizer().save_pretrained(folder / "base")
    (folder / "pairs.jsonl").write_text("\n".join(HELDOUT_FILE.read_text().splitlines()[:8]))
    train = [
        "train", "--model_name_or_path", str(folder / "base"), "--train_data", str(folder / "pairs.jsonl"), "--use_cpu",
        "true", "--pairs_per_step", "4", "--max_steps", "1", "--learning_rate", "1e-2", "--prompt_order",
        "dimension_last", "--score_min", "0", "--score_max", "10",
    ]  # fmt: skip
    assert main([*train, "--output_dir", str(folder / "full")]) == 0
    assert main([*train, "--use_peft", "true", "--output_dir", str(folder / "lora")]) == 0
    return folder


@pytest.mark.parametrize("run", ["full", "full/checkpoint-1", "lora", "lora/checkpoint-1"])
def test_the_folder_asks_for_the_prompts_of_training(runs, run):
    tokenizer = AutoTokenizer.from_pretrained(runs / run)
    builder = PromptBuilder(demo_tokenizer(), DIMENSIONS, score_range=(0, 10), order="dimension_last", max_length=1024)
    pair = read_pairs(runs / "pairs.jsonl", dimensions=DIMENSIONS, score_range=(0, 10))[0][0]
    messages = [message._asdict() for message in pair.messages]
    for dimension, expected in zip(DIMENSIONS, builder.tokens(pair).prompts, strict=True):
        score = pair.chosen_scores.get(dimension)
        assert prompt_of(tokenizer, messages, dimension=dimension, score=score) == list(expected)
    recipe = Recipe.read(runs / run)
    assert recipe.dimensions == DIMENSIONS and recipe.score_range == (0, 10) and recipe.base_model["weights"]
    assert recipe.data["pairs"] == 8 and recipe.objective["beta"] == 0.8


def test_the_saved_model_keeps_the_bases_dtype_and_stops_at_the_trained_token(runs):
    saved = load_file(runs / "full" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16} and "lm_head.weight" not in saved
    checkpoint = load_file(runs / "full" / "checkpoint-1" / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(runs / "full", dtype="auto")
    assert model.dtype == torch.bfloat16 and torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    generation = model.generation_config
    assert generation.eos_token_id == [0, demo_tokenizer().eos_token_id]
    assert (generation.temperature, generation.top_p, generation.do_sample) == (0.7, 0.9, True)


def test_a_generation_config_that_could_not_be_saved_is_mended_before_training(runs, tmp_path, caplog):
    shutil.copytree(runs / "base", tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.9, "do_sample": False, "eos_token_id": 2}))
    arguments = [
        "train", "--model_name_or_path", str(tmp_path / "base"), "--train_data", str(runs / "pairs.jsonl"), "--use_cpu",
        "true", "--max_steps", "1", "--pairs_per_step", "4", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "sampling fields without do_sample" in caplog.text
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["temperature"] == 0.9


def test_the_card_says_how_the_model_is_asked(runs):
    for run, load in (("full", "AutoModelForCausalLM"), ("lora", "AutoPeftModelForCausalLM")):
        text = (runs / run / "README.md").read_text()
        assert f'{load}.from_pretrained("{run}")' in text and 'dimension="helpfulness", score=10' in text
        assert "8 pairs an epoch, 1 optimizer steps" in text and "![Metrics of the run](metrics.png)" in text
        code = [line.strip() for line in text.splitlines() if line.startswith("    ") and "curl" not in line][:4]
        trained = TrainedModel.load(str(runs / run))
        names = {"tokenizer": AutoTokenizer.from_pretrained(runs / run), "model": trained.model}
        exec("\n".join(code).replace("max_new_tokens=200", "max_new_tokens=2"), names)


def test_answers_of_a_run_of_an_adapter_and_of_its_merge(runs, tmp_path):
    merge_adapter(runs / "lora", tmp_path / "merged")
    sampling = Sampling(max_new_tokens=8, temperature=0)
    answers = {}
    for name in ("full", "lora", str(tmp_path / "merged")):
        trained = TrainedModel.load(str(runs / name))
        prompts = [trained.prompt(QUESTION, Target.parse([f"helpfulness={score}"])) for score in (1, 10)]
        together = generate(trained.model, trained.tokenizer, prompts, sampling)
        alone = [generate(trained.model, trained.tokenizer, [prompt], sampling)[0] for prompt in prompts]
        assert together == alone  # padding changes nothing
        answers[name] = together
    assert all(one != other for one, other in answers.values())  # what is asked for matters
    assert Recipe.read(tmp_path / "merged") == Recipe.read(runs / "lora")
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert demo_tokenizer().eos_token_id in generation["eos_token_id"]


def test_generate_writes_answers_of_two_models(runs, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Where?"}) + "\n" + json.dumps({"messages": QUESTION}) + "\n")
    options = ["--data", str(prompts), "--target", "helpfulness=7", "--max_new_tokens", "4"]
    out = tmp_path / "answers.jsonl"
    assert main(["generate", str(runs / "full"), *options, "--compare", str(runs / "base"), "--output_file", str(out)]) == 0  # noqa: E501
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["record"] for record in records] == [0, 1] and records[1]["messages"] == QUESTION
    assert set(records[0]["answers"]) == {str(runs / "full"), str(runs / "base")}
    assert records[0]["target"] == "helpfulness=7"
    assert main(["generate", str(runs / "full"), "--prompt", "Where?", "--max_new_tokens", "4", "--seed", "1"]) == 0
    assert "all dimensions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN", "--target", "speed=3"], "unknown dimension speed: choose one of"),
        (["RUN", "--target", "helpfulness=11"], "needs a score from 0 to 10, found 11"),
        (["RUN", "--target", "helpfulness=x"], "'x' is no score"),
        (["RUN", "--target", "none", "--target", "helpfulness=1"], "leave the others out"),
        (["RUN", "--target", "no_object=3"], "dimension no_object takes no score"),
        (["RUN", "--target", "helpfulness"], "needs a score from 0 to 10, found none"),
        (["RUN", "--top_p", "2"], "top_p=2.0 must be at most 1"),
        (["RUN", "--repetition_penalty", "0"], "repetition_penalty=0.0 must be positive"),
        (["RUN", "--output_file", "/no/such/folder/x"], "name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_generated_is_named(runs, capsys, options, message):
    names = {"RUN": str(runs / "full"), "BASE": str(runs / "base")}
    assert main(["generate", "--prompt", "Q", *(names.get(option, option) for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_without_a_recipe_cannot_be_asked(runs, capsys):
    assert main(["generate", str(runs / "base"), "--prompt", "Q", "--target", "helpfulness=1"]) == 1
    assert "has no amopo_recipe.json" in capsys.readouterr().err


def test_a_dialogue_changes_its_target(runs, capsys, monkeypatch):
    lines = iter(["Hello", "/target helpfulness=1", "And now?", "/target speed=1", "/wrong", "/new", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(runs / "full"), "--target", "helpfulness=10", "--max_new_tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert "asked for: helpfulness=10" in printed and "asked for: helpfulness=1\n" in printed
    assert "unknown dimension speed" in printed and "unknown command /wrong" in printed


def test_models_are_evaluated_as_they_were_trained(runs, tmp_path, capsys):
    data = ["--eval_data", str(runs / "pairs.jsonl")]
    assert main(["eval", str(runs / "full"), str(runs / "base"), *data, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"{runs / 'base'}: no recipe of its own: prompted as the other model was trained" in said
    by_recipe = json.loads((tmp_path / "eval.json").read_text())["eval"]["full"]
    explicit = ["--prompt_order", "dimension_last", "--score_min", "0", "--score_max", "10"]
    assert main(["eval", str(runs / "full"), *data, *explicit, "--output_dir", str(tmp_path)]) == 0
    assert "as asked" not in capsys.readouterr().err
    assert json.loads((tmp_path / "eval.json").read_text())["eval"]["full"]["mean"] == by_recipe["mean"]
    other = ["--prompt_order", "dimension_first"]
    assert main(["eval", str(runs / "full"), *data, *other, "--output_dir", str(tmp_path)]) == 0
    assert "prompt_order is 'dimension_first' as asked, 'dimension_last' in training" in capsys.readouterr().err
    assert json.loads((tmp_path / "eval.json").read_text())["eval"]["full"]["mean"] != by_recipe["mean"]


# merging


def test_another_base_is_refused(runs, tmp_path):
    demo_model(1).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not the model that the adapter was trained over"):
        merge_adapter(runs / "lora", tmp_path / "merged", base=str(tmp_path / "other"))
    demo_model(0).to(torch.bfloat16).float().save_pretrained(tmp_path / "same")  # another dtype is the same model
    demo_tokenizer().save_pretrained(tmp_path / "same")
    merge_adapter(runs / "lora", tmp_path / "merged", base=str(tmp_path / "same"))
    with pytest.raises(ValueError, match="is a file"):
        merge_adapter(runs / "lora", runs / "pairs.jsonl")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]])
def test_an_adapter_on_one_of_two_tied_weights_unties_them(tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    base = demo_model(0)
    assert base.config.tie_word_embeddings
    base.save_pretrained(tmp_path / "base")
    demo_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 900, (2, 20)))
    expected = adapted.eval()(ids).logits
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (merged(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not merged.config.tie_word_embeddings


def test_a_merge_that_changes_the_model_is_an_error(runs, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    own = LoraModel.merge_and_unload

    def spoiled(self, *args, **kwargs):
        merged = own(self, *args, **kwargs)
        with torch.no_grad():
            merged.model.layers[0].mlp.up_proj.weight.mul_(-1)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoiled)
    with pytest.raises(ValueError, match="merged model's log-probs differ"):
        merge_adapter(runs / "lora", tmp_path / "merged")


def test_a_tokenizer_that_the_saved_folder_would_not_give_back_is_refused(runs, tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = Tokenizer.from_str(demo_tokenizer().backend_tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="other tokens when it is loaded again beside a qwen2 model"):
        check_tokenizer_reloads(tokenizer, demo_model(0))
    check_tokenizer_reloads(demo_tokenizer(), demo_model(0))


# a real server


def test_transformers_serve_gives_the_answer_to_the_prompt_of_training_and_judges(runs, tmp_path):
    pytest.importorskip("fastapi", reason="transformers' server is not installed")
    pytest.importorskip("uvicorn", reason="transformers' server is not installed")
    pytest.importorskip("openai", reason="transformers' server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(runs / "full")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32", model]  # fmt: skip
    server = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    trained = TrainedModel.load(model)
    try:
        for score in (1, 10):
            body = {"model": model, "messages": QUESTION, "max_tokens": 8, "temperature": 0,
                    "chat_template_kwargs": {"dimension": "helpfulness", "score": score}}  # fmt: skip
            answer = _post(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
            prompt = trained.prompt(QUESTION, Target.parse([f"helpfulness={score}"]))
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            [own] = generate(trained.model, trained.tokenizer, [prompt], Sampling(max_new_tokens=8, temperature=0))
            assert answer["choices"][0]["message"]["content"].strip() == own
        check_judge(f"http://127.0.0.1:{port}/v1", model, trained, tmp_path)
    finally:
        server.kill()
        server.communicate()


def check_judge(url, model, trained, folder):
    """What a judge behind the server replies is what the model says, token for token."""
    (folder / "template.txt").write_text("{answer} {dimension}: 0 1 2 3 4 5 ?")
    options = JudgeOptions(model=model, template=str(folder / "template.txt"), request={"max_tokens": 6}, concurrency=2)
    judge = load_judge(url, options, wording=trained.recipe.wording, score_range=(0, 5), cache=folder / "replies.jsonl")
    answers = [Answer(tuple(QUESTION), text) for text in ("Here.", "There it is.")]
    scores = judge.scores(answers, ["helpfulness"])[:, 0]
    texts = [judge.template.to_score(answer, "helpfulness", judge.wording, (0, 5)) for answer in answers]
    replies = judge.client.replies(texts)
    prompts = [trained.prompt([{"role": "user", "content": text}], Target({})) for text in texts]
    own = generate(trained.model, trained.tokenizer, prompts, Sampling(max_new_tokens=6, temperature=0))
    assert [reply.strip() for reply in replies] == own
    assert judge.usage.requests == 2 and judge.usage.cached == 2
    assert judge.usage.prompt_tokens == sum(map(len, prompts)) and 0 < judge.usage.completion_tokens <= 12
    assert scores == pytest.approx([read_score(reply, (0, 5)) for reply in replies], nan_ok=True)


def _post(url, body, server):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None, server.communicate()[0][-2000:]
            time.sleep(0.1)
    raise AssertionError("the server did not answer")

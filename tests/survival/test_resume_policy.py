"""What a run may change when it goes on: each option by name with both values, and each answer to it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from small_run import small_model, small_pairs, small_trainer
from test_checkpoints import At, lora_model

from amopo_fast.data.config import DataConfig
from amopo_fast.errors import CheckpointError
from amopo_fast.models.config import ModelConfig
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.wording import Wording
from amopo_fast.survival.checkpoints import complete_checkpoints
from amopo_fast.survival.manifest import read_marker
from amopo_fast.training.arguments import REFUSED
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.resume import ADAPTER, ADAPTER_METHOD, METHOD
from amopo_fast.training.resume import OPTIONS as OPTIONS_ASKED

OPTIONS = {"max_steps": 8, "num_train_epochs": 2, "eval_strategy": "no", "logging_steps": 1, "save_steps": 3,
           "warmup_steps": 2, "save_total_limit": None}  # fmt: skip

CHANGES = {
    "learning_rate": 2e-2, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2,
    "max_grad_norm": 0.01, "lr_scheduler_type": "linear", "warmup_steps": 5, "beta": 3.0, "gamma": 0.1,
    "weighting": "uniform", "sft_coef": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of eight steps that was stopped after three, and the same one left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    small_trainer(folder / "alone", **OPTIONS).train()
    run = small_trainer(folder / "run", **OPTIONS, callbacks=[At(2, lambda: run.termination._received("SIGTERM"))])
    run.train()
    assert [each.step for each in complete_checkpoints(folder / "run")] == [3]
    return folder


# What becomes of every option on a resume; the page has the same.
ASKED = {*OPTIONS_ASKED, *ADAPTER}
SAME_METHOD = {*METHOD, *ADAPTER_METHOD}
# By what they make: the model's shape, dtypes and frozen weights, the token ids, the differences of scores, the order.
SAME_MODEL = {"model_name_or_path", "random_weights", "config_overrides", "use_peft", "load_in_4bit",
              "bnb_4bit_quant_type", "use_bnb_nested_quant", "weight_precision"}  # fmt: skip
SAME_DATA = {"train_data", "eval_share", "dimensions", "score_min", "score_max", "prompt_order", "prompt_template",
             "chat_template_kwargs", "template_date", "reasoning", "max_length", "truncated_responses",
             "on_bad_record", "missing_scores", "tied_dimensions", "tokenizer_name_or_path"}  # fmt: skip
SAME_ORDER = {"seed", "pairs_per_step", "per_device_train_batch_size", "gradient_accumulation_steps"}
LENGTH = {"num_train_epochs", "max_steps"}
FREE = {
    "ranks": ("ddp_", "fsdp", "deepspeed"), "rounding": ("bf16", "fp16", "tf32", "layout", "full_determinism"),
    "micro-batches": ("tokens_per_micro_batch",), "backends": ("kernel_backend", "attention_backend"),
    "speed": ("logits_cache_gib", "use_liger_kernel", "liger_kernel_config", "compile_layers", "dataloader_",
              "use_cpu"),
    "memory": ("gradient_checkpointing", "activation_checkpointing", "keep_layers", "optimizer_states", "weights",
               "memory_check", "torch_empty_cache_steps", "streaming"),
    "saving": ("save_", "output_dir", "hub_", "push_to_hub", "load_best_model_at_end", "metric_for_best_model",
               "greater_is_better", "restore_callback_states_from_checkpoint", "resume_from_checkpoint",
               "on_changed_option"),
    "evaluation": ("eval_", "per_device_eval_batch_size", "do_eval", "do_train"),
    "logging": ("log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "debug",
                "skip_memory_metrics", "dry_run"),
}  # fmt: skip


def test_every_option_has_its_place_in_the_policy():
    fields = {each.name for kind in (AMoPOConfig, ModelConfig, DataConfig) for each in dataclasses.fields(kind)
              if each.init} - set(REFUSED)  # fmt: skip
    decided = [ASKED, SAME_METHOD, SAME_MODEL, SAME_DATA, SAME_ORDER, LENGTH]
    prefixes = tuple(itertools.chain.from_iterable(FREE.values()))
    rest = fields - set().union(*decided)
    assert set().union(*decided) <= fields and sum(map(len, decided)) == len(set().union(*decided))
    assert not {name for name in rest if not name.startswith(prefixes)}
    unused = {prefix for prefix in prefixes if not any(name.startswith(prefix) for name in rest)}
    assert unused <= {"activation_checkpointing"}  # of later transformers
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    policy = page[page.index("## What may change on a resume") : page.index("`python -m pytest -m slow tests/surv")]
    assert not {name for name in set().union(*decided) if f"`{name}`" not in policy}
    assert all(part in policy for part in FREE)


def resumed(stopped, tmp_path, **options):
    run = small_trainer(tmp_path, **{**OPTIONS, "weight_decay": 0.0, **options})
    run.train(resume_from_checkpoint=str(stopped / "run" / "checkpoint-3"))
    return run


def weights(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def rates(run):
    return [line["learning_rate"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_refused_with_both_values(stopped, tmp_path, name):
    before = getattr(small_trainer(tmp_path, **OPTIONS).args, name)
    shown = getattr(before, "value", before)
    message = f"checkpoint-3 was saved with other options: {name} was {shown}, is {CHANGES[name]}"
    with pytest.raises(CheckpointError, match=message + ".*on_changed_option keep"):
        resumed(stopped, tmp_path, **{name: CHANGES[name]})


def test_keep_goes_on_as_if_nothing_had_changed(stopped, tmp_path):
    expected = torch.load(stopped / "alone" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    run = resumed(stopped, tmp_path, **CHANGES, on_changed_option="keep")
    found = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert str(expected) == str(found) and run.args.learning_rate == 1e-2
    kept = read_marker(tmp_path / "checkpoint-8")["fingerprint"]["options"]
    assert kept == read_marker(stopped / "run" / "checkpoint-3")["fingerprint"]["options"]


@pytest.mark.parametrize("name", CHANGES)
def test_use_goes_on_with_the_new_value(stopped, tmp_path, name):
    """The new value is what the optimizer, the schedule and the loss have after the resume, and it is saved."""
    kept = load_file(stopped / "alone" / "checkpoint-8" / "model.safetensors")
    used = resumed(stopped, tmp_path / "used", **{name: CHANGES[name]}, on_changed_option="use")
    assert not equal(kept, weights(used))
    assert read_marker(tmp_path / "used" / "checkpoint-8")["fingerprint"]["options"][name] == CHANGES[name]
    fresh = small_trainer(tmp_path / "fresh", **{**OPTIONS, name: CHANGES[name]})
    fresh.create_optimizer_and_scheduler(OPTIONS["max_steps"])
    schedule, expected_rates = fresh.lr_scheduler, []
    for _ in range(OPTIONS["max_steps"]):
        expected_rates += schedule.get_last_lr()[:1]
        fresh.optimizer.step(), schedule.step()
    assert rates(used)[3:] == pytest.approx(expected_rates[3:])
    for group, expected in zip(used.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        for key in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
            assert group[key] == pytest.approx(expected[key]), key
    assert used.objective == fresh.objective


def adapted(output_dir, **options):
    given = {**OPTIONS, "max_steps": 4, **options.pop("given", {})}
    adapter = LoraConfig(r=2, target_modules=["q_proj"], **options)
    return small_trainer(output_dir, model=small_model(), peft_config=adapter, **given)


def test_the_options_of_an_adapter(tmp_path):
    saved = {"lora_alpha": 4, "lora_dropout": 0.1}
    adapted(tmp_path, **saved, given={"max_steps": 2}).train()
    for name, value in {"lora_alpha": 8, "lora_dropout": 0.2}.items():
        with pytest.raises(CheckpointError, match=f"{name} was {saved[name]}, is {value}"):
            adapted(tmp_path, **{**saved, name: value}).train(resume_from_checkpoint="last")
        with pytest.raises(CheckpointError, match=f"{name} is part of the model: make its adapter with the"):
            keep = adapted(tmp_path, **{**saved, name: value}, given={"on_changed_option": "keep"})
            keep.train(resume_from_checkpoint="last")
    use = adapted(tmp_path, **{**saved, "lora_alpha": 8}, given={"on_changed_option": "use", "max_steps": 3})
    use.train(resume_from_checkpoint="last")
    assert read_marker(tmp_path / "checkpoint-3")["fingerprint"]["options"]["lora_alpha"] == 8
    with pytest.raises(CheckpointError, match="method: use_rslora changed from False to True"):
        adapted(tmp_path, **{**saved, "lora_alpha": 8, "use_rslora": True}).train(resume_from_checkpoint="last")


def test_keep_makes_the_adapter_of_the_checkpoint(tmp_path):
    from amopo_fast.training.resume import adapter_of

    small_trainer(tmp_path, model=lora_model(), max_steps=2).train()
    config = ModelConfig("x", use_peft=True, lora_alpha=99, lora_dropout=0.9)
    assert adapter_of(tmp_path / "checkpoint-2", config) == dataclasses.replace(config, lora_alpha=8, lora_dropout=0.1)


def test_another_method_is_another_run(stopped, tmp_path):
    for options, message in (
        ({"objective": "simpo", "beta": 0.8, "gamma": 2.0}, "method: objective changed from amopo to simpo"),
        ({"optim": "sgd"}, "method: optim changed from adamw_torch.* to sgd"),
    ):
        with pytest.raises(CheckpointError, match=f"belongs to another run: .*{message}"):
            resumed(stopped, tmp_path, **options, on_changed_option="use")


def test_other_scores_are_other_data(tmp_path):
    """Where the tokens, which show the chosen side's alone, are the same."""

    def run(gap, **options):
        pairs = [dataclasses.replace(pair, score_gaps=np.array([np.nan, gap])) for pair in small_pairs(14)]
        return small_trainer(tmp_path, pairs=pairs, weighting="score_gap", **options)

    run(1.0, max_steps=2).train()
    with pytest.raises(CheckpointError, match="data: scores changed"):
        run(2.0, max_steps=3).train(resume_from_checkpoint="last")
    run(1.0, max_steps=3).train(resume_from_checkpoint="last")


def test_a_longer_run_follows_the_old_schedule_to_its_end_and_then_a_new_one(tmp_path):
    """Cosine with a warm-up of two steps: 8 steps, then 8 more (epochs 2 to 4), wherever the first was stopped."""
    short = small_trainer(tmp_path / "short", **{**OPTIONS, "max_steps": -1})
    short.train()
    ends = []
    for name, step in (("end", 8), ("middle", 3)):
        run = small_trainer(tmp_path / name, **{**OPTIONS, "max_steps": -1, "num_train_epochs": 4})
        run.train(resume_from_checkpoint=str(tmp_path / "short" / f"checkpoint-{step}"))
        found = rates(run)
        assert found[:8] == pytest.approx(rates(short)) and found[8:] == pytest.approx(rates(short)), found
        assert max(abs(b - a) for a, b in zip(found, found[1:], strict=False)) <= 1e-2 / 2 + 1e-12  # the warm-up's step
        ends.append(weights(run))
        assert read_marker(tmp_path / name / "checkpoint-16")["schedule"] == [8, 16]
    assert equal(*ends)
    again = small_trainer(tmp_path / "end", **{**OPTIONS, "max_steps": -1, "num_train_epochs": 4})
    again.train(resume_from_checkpoint=str(tmp_path / "end" / "checkpoint-12"))
    assert rates(again) == found and equal(weights(again), ends[0])


def test_a_shorter_run_ends_on_the_old_schedule(stopped, tmp_path):
    alone = [json.loads(line) for line in (stopped / "alone" / "metrics.jsonl").read_text().splitlines()]
    run = resumed(stopped, tmp_path, max_steps=5)
    assert run.state.global_step == 5 and rates(run) == [line["learning_rate"] for line in alone[:5]]


def test_the_recipes_keys_that_differ_are_named(tmp_path):
    wording = Wording("{name}: {score}", "{names}", {}, {})
    recipe = Recipe(("first", "second"), wording, "dimension_first", (0.0, 4.0), 64, {"id": 1, "text": "a"},
                    {"template_date": "2026-01-01"})  # fmt: skip
    small_trainer(tmp_path, recipe=recipe, max_steps=2).train()
    assert Recipe.read(tmp_path / "checkpoint-2").max_length == 64
    run = small_trainer(tmp_path, recipe=dataclasses.replace(recipe, prompt_options={"template_date": "2026-02-02"}))
    run.args.max_steps = 3
    run.train(resume_from_checkpoint="last")  # the tokens are the same
    other = dataclasses.replace(recipe, max_length=32, wording=dataclasses.replace(wording, score="{score}"))
    message = r"recipe: max_length changed from 64 to 32; .*recipe: wording changed from"
    with pytest.raises(CheckpointError, match=message):
        small_trainer(tmp_path, recipe=other).train(resume_from_checkpoint="last")


def test_an_adapters_first_weights_follow_the_seed(tmp_path):
    def first(seed, noise):
        torch.manual_seed(noise)
        run = small_trainer(tmp_path, model=small_model(), seed=seed, peft_config=LoraConfig(r=2))
        return {name: p.detach().clone() for name, p in run.model.named_parameters() if "lora_A" in name}

    assert equal(first(1, 5), first(1, 6)) and not equal(first(1, 5), first(2, 5))

"""A hybrid, a mixture of experts and a multimodal class: adapters, compiled layers, a resume that changes nothing."""

import pytest
import torch
from kinds_of_models import KINDS, model_of
from packing_cases import largest_error, loss_and_gradients, random_pairs, separate_stats, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from amopo_fast.errors import OptionError
from amopo_fast.models import faster_layers
from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.faster_layers import compile_layers
from amopo_fast.models.loading import add_adapter, load_adapter, load_whole
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

PAIRS = random_pairs(2, 2)
ERROR = {"hybrid": 2e-4, "moe": 1e-5, "multimodal": 1e-5}  # the recurrences round in float32


def packed(model):
    plan = build_plan(PAIRS, choice_of(model).layout, min_node_tokens=4)
    return loss_and_gradients(model, score(model, plan))


def adapter(targets="all-linear"):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_with_checkpointing(kind):
    torch.manual_seed(1)
    model = add_adapter(model_of(kind), adapter())
    truth = loss_and_gradients(model, separate_stats(model, PAIRS))
    prepare_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = packed(model)
    assert got[1].keys() == truth[1].keys() and all("lora" in name for name in got[1])
    assert len(got[1]) == sum(parameter.requires_grad for parameter in model.parameters())
    assert largest_error(got, truth) < ERROR[kind]


def test_matrices_of_fused_experts_are_named_like_modules(tmp_path):
    torch.manual_seed(1)
    model = add_adapter(model_of("moe"), adapter(["q_proj", "experts.down_proj"]))
    truth = loss_and_gradients(model, separate_stats(model, PAIRS))
    got = packed(prepare_model(model))
    assert len(got[1]) == 8 and largest_error(got, truth) < ERROR["moe"]  # A and B, two targets, two layers
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 20)[None]
    logits = model(ids).logits
    loaded = load_adapter(model_of("moe"), tmp_path)
    assert torch.equal(loaded(ids).logits, logits)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert (merged(ids).logits - logits).norm() < 1e-5 * logits.norm()
    assert (model_of("moe")(ids).logits - logits).norm() > 0.1 * logits.norm()
    message = "'up_down' is none of the model; the model's linear layers are down_proj, gate_up_proj, k"
    for names in (["up_down"], ["q_proj", "up_down"]):  # which peft would leave out in silence
        with pytest.raises(OptionError, match=message):
            add_adapter(model_of("moe"), adapter(names))


# Of a multimodal class the compiled layers are those of the dense models in test_faster_layers.py.
@pytest.mark.parametrize(
    "kind", ["moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hybrid", "multimodal"))]
)
def test_compiled_layers(kind):
    truth = loss_and_gradients(model := model_of(kind), separate_stats(model, PAIRS))
    torch._dynamo.reset()
    faster_layers._compiled_class.cache_clear()
    model = prepare_model(model_of(kind))
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    assert largest_error(packed(model), truth) < ERROR[kind]
    assert counter.frame_count >= 2


def test_compiled_layers_of_padded_rows_are_refused():
    model = prepare_model(tiny_model("llama"), "separate")
    with pytest.raises(OptionError, match="LlamaForCausalLM trains in the layout separate: leave compile_layers out"):
        compile_layers(model)


def trainer(folder, kind, eval_dataset=None, **options):
    config = AMoPOConfig(
        output_dir=str(folder), pairs_per_step=2, num_train_epochs=1, use_cpu=True, learning_rate=1e-3,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=2, disable_tqdm=True, report_to="none",
        **options,
    )  # fmt: skip
    return AMoPOTrainer(model_of(kind), config, dimensions=["a", "b", "c"], train_dataset=random_pairs(4, 8),
                        eval_dataset=eval_dataset)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_exact(kind, tmp_path):
    whole = trainer(tmp_path / "whole", kind)
    whole.train()
    before = dict(model_of(kind).named_parameters())
    cut = trainer(tmp_path / "cut", kind)
    cut.args.max_steps = 2
    cut.train()
    resumed = trainer(tmp_path / "cut", kind)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == whole.state.global_step == 4
    found = dict(resumed.model.named_parameters())
    moved = 0
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, found[name]), name
        moved += not torch.equal(parameter, before[name])
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert moved > 10
    layout = choice_of(resumed.model).layout
    assert layout is (Layout.STATES if kind == "hybrid" else Layout.SHARED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    """Its checkpoint's names are others than the model's own: what Trainer does not find there it leaves as it is."""
    run = trainer(
        tmp_path, kind, random_pairs(4, 4), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,  # so that the best is not the last
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2") and run.state.global_step == 4
    best = load_whole(run.state.best_model_checkpoint).state_dict()
    last = load_whole(tmp_path / "checkpoint-4").state_dict()
    found = run.model.state_dict()
    assert found.keys() == best.keys() and all(torch.equal(found[name], best[name]) for name in best)
    assert sum(not torch.equal(found[name], last[name]) for name in last) > 10

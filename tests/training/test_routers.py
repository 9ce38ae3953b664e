"""The routers' loss of a shared row equals transformers' own on the separate sequences, and is trained as an option."""

import numpy as np
import pytest
import torch
from packing_cases import random_pairs, sequences_of, tiny_model
from transformers import GraniteMoeHybridConfig, MixtralConfig

from amopo_fast.errors import CheckpointError
from amopo_fast.models.architecture import UnsupportedModelError
from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.trainer import AMoPOTrainer

CONFIGS = {"mixtral": MixtralConfig(), "hybrid": GraniteMoeHybridConfig(
    num_hidden_layers=4, layer_types=["mamba", "attention"] * 2, num_local_experts=4, mamba_n_heads=128)}  # fmt: skip
PAIRS = random_pairs(3, 3, absent=True)


def of_separate_sequences(model):
    """transformers' own, over a padded batch of the sequences without their last token."""
    sequences = [item[0][:-1] for item in sequences_of(PAIRS) if item is not None]
    longest = max(map(len, sequences))
    ids = torch.stack([torch.from_numpy(np.pad(each, (0, longest - len(each)))) for each in sequences])
    mask = torch.stack([torch.arange(longest) < len(each) for each in sequences]).long()
    return model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss


@pytest.mark.parametrize("family, layout", [("qwen3_moe", "shared"), ("qwen3_moe", "separate"),
                         ("gpt_oss", "shared"), ("mixtral", "shared"), ("hybrid", "shared")])  # fmt: skip
def test_of_a_row_equals_that_of_the_separate_sequences(family, layout):
    model = tiny_model(family, config=CONFIGS.get(family))
    truth = of_separate_sequences(model)
    if not isinstance(truth, torch.Tensor):
        pytest.skip(f"this version of transformers computes no routers' loss of {type(model).__name__}")
    truth.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prepare_model(model, layout)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    plan = build_plan(PAIRS, model.amopo_choice.layout, min_node_tokens=4)
    assert (plan.token_uses.max() > 3) == (layout == "shared")
    score(model, plan, router_losses=losses)
    (loss,) = losses
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    loss.backward()
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        assert (found - gradient).norm() <= 2e-4 * gradient.norm().clamp(min=floor), name


@pytest.mark.parametrize("layout", Layout)
def test_uses_count_the_sequences_of_every_token(layout):
    plan = build_plan(PAIRS, layout, min_node_tokens=4)
    lengths = [len(item[0]) - 1 for item in sequences_of(PAIRS) if item is not None]
    assert plan.token_uses.shape == (plan.num_tokens,) and int(plan.token_uses.sum()) == sum(lengths)
    seen = plan.input_ids.flatten().repeat_interleave(plan.token_uses).bincount()
    expected = np.concatenate([item[0][:-1] for item in sequences_of(PAIRS) if item is not None])
    assert torch.equal(seen, torch.from_numpy(expected).bincount())


def trainer(folder, family="qwen3_moe", **options):
    config = AMoPOConfig(**{
        "output_dir": str(folder), "pairs_per_step": 4, "num_train_epochs": 1, "use_cpu": True, "learning_rate": 1e-3,
        "logging_steps": 1, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
        "report_to": "none", **options,
    })  # fmt: skip
    return AMoPOTrainer(tiny_model(family), config, dimensions=["a", "b", "c"], train_dataset=random_pairs(4, 8))


def test_the_option_adds_it_to_the_loss_by_the_share_of_pairs(tmp_path):
    """Steps of two micro-batches: the first step's loss grows by the coefficient times the mean over pairs."""
    logs = []
    for coefficient in (0.0, 0.5):
        run = trainer(tmp_path / str(coefficient), router_aux_loss_coef=coefficient, tokens_per_micro_batch=400)
        assert run.args.gradient_accumulation_steps == 2
        run.train()
        logs.append([line for line in run.state.log_history if "loss" in line])
    without, with_loss = logs
    assert "router_loss" not in without[0] and with_loss[0]["router_loss"] > 1
    assert with_loss[0]["loss"] == pytest.approx(without[0]["loss"] + 0.5 * with_loss[0]["router_loss"], rel=1e-4)
    assert with_loss[1]["router_loss"] < with_loss[0]["router_loss"] + 0.5


def test_a_resume_with_another_coefficient_is_asked_about(tmp_path):
    def run(coefficient, steps, **options):
        return trainer(tmp_path, router_aux_loss_coef=coefficient, max_steps=steps, save_strategy="steps", save_steps=1,
                       **options)  # fmt: skip

    alone = run(0.5, 2)
    alone.train()
    with pytest.raises(CheckpointError, match="router_aux_loss_coef was 0.5, is 0.1"):
        run(0.1, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    kept = run(0.1, 2, on_changed_option="keep")
    kept.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, weight in alone.model.named_parameters():
        assert torch.equal(weight, kept.model.get_parameter(name)), name


@pytest.mark.parametrize(
    "family, reason",
    [
        ("llama", "LlamaForCausalLM has no load-balancing loss in transformers"),
        ("deepseek_v3", "DeepseekV3ForCausalLM has no load-balancing"),
    ],
)
def test_a_model_without_it_is_refused_by_name(tmp_path, family, reason):
    with pytest.raises(UnsupportedModelError, match=f"router_aux_loss_coef: {reason}"):
        trainer(tmp_path, family, router_aux_loss_coef=0.1)

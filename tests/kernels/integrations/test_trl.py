"""patch_trl against the installed trainers of TRL: log-probs, losses, metrics and gradients, before and after."""

import pytest
import torch
from models_for_integrations import KINDS, add_lora, tiny_model
from trainers_of_trl import assert_same_gradients, batch, both_ways, dpo_trainer, trl_trainers  # noqa: F401

from amopo_kernels import UnsupportedError
from amopo_kernels.integrations.trl import patch_trl


@pytest.mark.parametrize("kind, options", [
    ("tied", {}), ("softcap", {"use_weighting": True}), ("scaled", {"loss_type": ["sigmoid", "sft"]}),
    ("tied", {"gradient_checkpointing": True}), ("tied", {"bf16": True}), ("lora", {}),
])  # fmt: skip
def test_dpo(trl, tmp_path, kind, options):
    model, trainer = dpo_trainer(trl, kind, tmp_path, **options)
    inputs = batch(model)

    def run(trainer):
        with trainer.accelerator.autocast():
            return trainer._compute_loss(trainer.model, inputs, return_outputs=False)

    (theirs, expected, their_metrics), (ours, found, our_metrics) = both_ways(trainer, run, patch_trl)
    tolerance = 2e-2 if options.get("bf16") else 1e-5
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert our_metrics == pytest.approx(their_metrics, rel=tolerance, abs=tolerance)
    assert {"logits/chosen", "mean_token_accuracy", "entropy", "logps/chosen"} <= our_metrics.keys()
    assert our_metrics["logits/chosen"] != 0
    assert_same_gradients(found, expected, 10 * tolerance)


@pytest.mark.parametrize("kind", ["tied", "softcap", "scaled"])
def test_grpo(trl, tmp_path, kind):
    model = tiny_model(kind)
    trainer = trl("grpo", model, tmp_path)
    inputs = batch(model)

    def run(trainer):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, inputs["input_ids"], inputs["attention_mask"], 7, compute_entropy=True
        )
        factor = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
        return (factor * logps + 0.1 * entropies).sum(), logps, entropies

    (theirs, expected, _), (ours, found, _) = both_ways(trainer, run, patch_trl)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("kind, options", [
    ("tied", {}), ("softcap", {"loss_type": "simpo", "cpo_alpha": 0.5}), ("scaled", {"gradient_checkpointing": True}),
    ("lora on the head", {}),
])  # fmt: skip
def test_cpo(trl, tmp_path, kind, options):
    model = add_lora(tiny_model("untied"), "lm_head", "q_proj") if "lora" in kind else tiny_model(kind)
    trainer = trl("cpo", model, tmp_path, **options)
    both = batch(model)
    labels = both["input_ids"].masked_fill(both["completion_mask"] == 0, -100)
    inputs = {}
    for i, side in enumerate(("chosen", "rejected")):
        rows = slice(2 * i, 2 * i + 2)
        inputs |= {f"{side}_input_ids": both["input_ids"][rows], f"{side}_labels": labels[rows],
                   f"{side}_attention_mask": both["attention_mask"][rows]}  # fmt: skip

    def run(trainer):
        return trainer.get_batch_loss_metrics(trainer.model, inputs)

    (theirs, expected, _), (ours, found, _) = both_ways(trainer, run, patch_trl)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5, abs=1e-6) and ours[1]["logits/chosen"] != 0
    assert_same_gradients(found, expected)


def test_another_forward_is_refused_by_name():
    class Trainer:
        model = tiny_model("tied")

    with pytest.raises(UnsupportedError, match="Trainer: the forward of its Qwen2ForCausalLM is not that of TRL's"):
        patch_trl(Trainer())


def test_the_kinds_differ():
    assert set(KINDS) >= {"tied", "softcap", "scaled", "untied"}

"""patch_trl against the installed trainers of TRL: log-probs, losses, metrics and gradients, before and after."""

import logging
import warnings

import pytest
import torch
from models_for_integrations import KINDS, add_lora, tiny_model

from amopo_kernels import UnsupportedError, dispatch
from amopo_kernels.integrations.trl import patch_trl

pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(scope="module")
def trl():
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from datasets import Dataset
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from amopo_fast.demo.tokenizer import demo_tokenizer

    tokenizer = demo_tokenizer()
    row = {"prompt": "a question", "chosen": "an answer", "rejected": "another"}
    data = Dataset.from_list([row])
    common = {"use_cpu": True, "report_to": [], "disable_dropout": True}

    def make(name, model, folder, reference=None, **options):
        options = common | {"bf16": False, "gradient_checkpointing": False} | options
        if name == "dpo":
            args = trl.DPOConfig(output_dir=str(folder), beta=0.3, **options)
            return trl.DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
        if name == "grpo":
            args = trl.GRPOConfig(output_dir=str(folder), num_generations=2, per_device_train_batch_size=2,
                                  temperature=0.7, **options)  # fmt: skip
            return trl.GRPOTrainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
                                   train_dataset=data, processing_class=tokenizer)  # fmt: skip
        args = CPOConfig(output_dir=str(folder), beta=0.3, **options)
        return CPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    return make


def batch(model, rows=4, length=12, prompt=5):
    """Chosen rows, then rejected, of one length but for padding on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, -3:] = attention[2, -1:] = 0
    completion = attention.clone()
    completion[:, :prompt] = 0
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def gradients(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys() and expected
    largest = max(x.norm() for x in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < tolerance * max(gradient.norm(), 1e-2 * largest), name


def both_ways(trainer, run):
    """(result, gradients, metrics) of TRL's own head and of ours."""
    found = []
    for patched in (False, True):
        if patched:
            before = sum(dispatch.runs().values())
            patch_trl(trainer)
        trainer.model.zero_grad()
        if hasattr(trainer, "_metrics"):
            trainer._metrics["train"].clear()
            trainer._total_train_tokens = 0
        result = run(trainer)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        metrics = {name: values[-1] for name, values in getattr(trainer, "_metrics", {"train": {}})["train"].items()}
        found.append((result, gradients(trainer.model), metrics))
    assert sum(dispatch.runs().values()) > before
    return found


@pytest.mark.parametrize("kind, options", [
    ("tied", {}), ("softcap", {"use_weighting": True}), ("scaled", {"loss_type": ["sigmoid", "sft"]}),
    ("tied", {"gradient_checkpointing": True}), ("tied", {"bf16": True}), ("lora", {}),
])  # fmt: skip
def test_dpo(trl, tmp_path, kind, options):
    model = tiny_model("tied" if kind == "lora" else kind)
    if kind == "lora":
        trainer = trl("dpo", add_lora(model), tmp_path, **options)
    else:
        trainer = trl("dpo", model, tmp_path, tiny_model(kind, seed=1), **options)
    trainer.model.train()
    inputs = batch(model)

    def run(trainer):
        with trainer.accelerator.autocast():
            return trainer._compute_loss(trainer.model, inputs, return_outputs=False)

    (theirs, expected, their_metrics), (ours, found, our_metrics) = both_ways(trainer, run)
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

    (theirs, expected, _), (ours, found, _) = both_ways(trainer, run)
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

    (theirs, expected, _), (ours, found, _) = both_ways(trainer, run)
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

"""Trainers of the installed TRL around small models, and what they compute before and after a patch."""

import logging
import warnings

import pytest
import torch
from models_for_integrations import add_lora, tiny_model

from amopo_kernels import dispatch


@pytest.fixture(scope="module", name="trl")
def trl_trainers():
    """(name, model, folder, reference, **options) -> a trainer of the installed TRL."""
    pytest.importorskip("trl", reason="TRL is not installed")
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


def dpo_trainer(trl, kind, folder, **options):
    """(model, DPO's trainer in training mode) of a kind of `tiny_model` beside a reference of it, or "lora"."""
    model = tiny_model("tied" if kind == "lora" else kind)
    if kind == "lora":
        trainer = trl("dpo", add_lora(model), folder, **options)
    else:
        trainer = trl("dpo", model, folder, tiny_model(kind, seed=1), **options)
    trainer.model.train()
    return model, trainer


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


def both_ways(trainer, run, patch):
    """(result, gradients, metrics) of TRL's own way and of what `patch` makes of it."""
    found = []
    for patched in (False, True):
        if patched:
            before = sum(dispatch.runs().values())
            patch(trainer)
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

"""share_prefixes against the installed trainers of TRL: log-probs, losses, metrics and gradients, before and after."""

import pytest
import torch
from models_for_integrations import tiny_model
from trainers_of_trl import assert_same_gradients, both_ways, dpo_trainer, trl_trainers  # noqa: F401

from amopo_fast.errors import OptionError
from amopo_fast.integrations.trl import share_prefixes
from amopo_kernels import UnsupportedError

COMPLETION = 9  # columns


def batch(order, prompt_columns=23):
    """Rows of the prompts in `order`, 0 or 1, left-padded, each with a completion of its own, right-padded."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 512, (n,), generator=generator) for n in (23, 18)]
    ids = torch.zeros(len(order), prompt_columns + COMPLETION, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, which in enumerate(order):
        length = COMPLETION - 2 * row % 5
        tokens = torch.cat([prompts[which], torch.randint(3, 512, (length,), generator=generator)])
        place = slice(prompt_columns - len(prompts[which]), prompt_columns + length)
        ids[row, place], attention[row, place] = tokens, 1
    completion = attention.clone()
    completion[:, :prompt_columns] = 0
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


class Count:
    """Tokens that a model's body computes."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.base_model.layers[0].register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        self.tokens += inputs[0].shape[:2].numel()


@pytest.mark.parametrize("kind, options", [
    ("tied", {"use_weighting": True}), ("softcap", {"gradient_checkpointing": True}), ("scaled", {"bf16": True}),
    ("lora", {"loss_type": ["sigmoid", "sft"]}),
])  # fmt: skip
def test_dpo(trl, tmp_path, kind, options):
    model, trainer = dpo_trainer(trl, kind, tmp_path, **options)
    inputs = batch([0, 1, 0, 1])
    computed = []

    def run(trainer):
        count = Count(model)
        with trainer.accelerator.autocast():
            loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        count.hook.remove()
        computed.append(count.tokens)
        return loss

    (theirs, expected, their_metrics), (ours, found, our_metrics) = both_ways(trainer, run, share_prefixes)
    tolerance = 2e-2 if options.get("bf16") else 1e-5
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert our_metrics == pytest.approx(their_metrics, rel=tolerance, abs=tolerance)
    assert {"logits/chosen", "mean_token_accuracy", "entropy", "logps/chosen"} <= our_metrics.keys()
    assert_same_gradients(found, expected, 10 * tolerance)
    passes = 2 if kind == "lora" else 1  # the reference is the same model
    shared = 23 + 18 + sum(int(x) - 1 for x in inputs["completion_mask"].sum(1))
    assert computed == [passes * inputs["input_ids"].numel(), passes * shared]


@pytest.mark.parametrize("kind", ["tied", "softcap", "scaled"])
def test_grpo(trl, tmp_path, kind):
    trainer = trl("grpo", tiny_model(kind), tmp_path)
    inputs = batch([0, 0, 1, 0, 1])
    inputs["attention_mask"][3, -COMPLETION:] = 0  # a completion that is masked whole, as a truncated one may be
    mask = inputs["attention_mask"][:, -COMPLETION:].bool()

    def run(trainer):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, inputs["input_ids"], inputs["attention_mask"], COMPLETION, compute_entropy=True
        )
        factor = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
        return (factor * logps + 0.1 * entropies)[mask].sum(), logps[mask], entropies[mask]

    (theirs, expected, _), (ours, found, _) = both_ways(trainer, run, share_prefixes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected)


def test_a_step_of_grpo_runs_and_generates(trl, tmp_path):
    torch.manual_seed(0)
    model = tiny_model("tied")
    model.resize_token_embeddings(1024)  # for the tokenizer of the trainer's data
    trainer = trl("grpo", model, tmp_path, max_steps=1, max_completion_length=4, bf16=True,
                  learning_rate=1e-2)  # fmt: skip
    trainer.reward_funcs = [lambda completions, **_: [float(i) for i, _ in enumerate(completions)]]
    share_prefixes(trainer)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_an_all_masked_batch_is_a_loss_of_zero(trl, tmp_path):
    trainer = trl("grpo", tiny_model("tied"), tmp_path)
    share_prefixes(trainer)
    inputs = batch([0, 0])
    inputs["attention_mask"][:, -COMPLETION:] = 0
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, inputs["input_ids"], inputs["attention_mask"], COMPLETION
    )
    logps.sum().backward()
    assert not logps.any()


def test_what_has_no_rows_is_refused_by_name(trl, tmp_path):
    trainer = trl("grpo", tiny_model("tied"), tmp_path)
    share_prefixes(trainer)
    inputs = batch([0, 1])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    call = {"input_ids": inputs["input_ids"], "labels": labels, "fused_lm_head": True}
    with pytest.raises(OptionError, match="a batch has pixel_values; prefixes are shared between texts alone"):
        trainer.model(**call, attention_mask=inputs["attention_mask"], pixel_values=torch.zeros(1))
    with pytest.raises(OptionError, match="no attention_mask"):
        trainer.model(**call)
    holes = inputs["attention_mask"].clone()
    holes[1, 12] = 0
    with pytest.raises(ValueError, match="row 1: attention_mask has holes"):
        trainer.model(**call, attention_mask=holes)
    with pytest.raises(ValueError, match="row 0: tokens 0 to 32 are scored, its text is 0 to 32"):
        trainer.model(**call | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)},
                      attention_mask=inputs["attention_mask"])  # fmt: skip

    trainer.padding_free = True
    with pytest.raises(OptionError, match="padding_free=True lays sequences end to end"):
        share_prefixes(trainer)
    trainer.padding_free, trainer.aux_loss_enabled = False, True
    with pytest.raises(OptionError, match="a router's loss depends on"):
        share_prefixes(trainer)
    with pytest.raises(UnsupportedError, match="CPO"):
        share_prefixes(trl("cpo", tiny_model("tied"), tmp_path))

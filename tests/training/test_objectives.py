"""Objectives: the installed TRL's with one dimension, the mean over dimensions with more, the same under any split;
reference log-probs without a second model."""

import copy
import json
import types
import warnings

import numpy as np
import pytest
import torch
from run_training import pairs, trainer

from amopo_fast.errors import CheckpointError, OptionError
from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.objective import AMoPO, Batch
from amopo_fast.training.objectives import CPO, DPO, IPO, OBJECTIVES, ORPO, SFT, SimPO, objective_of
from amopo_kernels import SequenceStats, amopo_loss, sequence_stats

PAIRS = 5


def random_stats(dimensions=1, absent=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (PAIRS * dimensions * 2,), generator=generator)
    for pair, dimension in absent:
        index = 2 * (pair * dimensions + dimension)
        lengths[index : index + 2] = 0
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logps = (-3 * torch.rand(int(lengths.sum()), generator=generator, dtype=dtype)).requires_grad_()
    return logps, sequence_stats(logps, offsets)


def trl(name):
    pytest.importorskip("trl", reason="TRL is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    return {"cpo": CPOTrainer, "orpo": ORPOTrainer, "dpo": DPOTrainer}[name]


def compare(logps, outcome, loss, rewards):
    assert torch.allclose(outcome.loss, loss, rtol=1e-5)
    for name, expected in zip(("reward_chosen", "reward_rejected"), rewards, strict=True):
        assert torch.allclose(outcome.columns[name][:, 0], expected, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(each, logps, retain_graph=True)[0] for each in (outcome.loss, loss))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (SimPO(2.5, 0.7), {"loss_type": "simpo", "simpo_gamma": 0.7}),
        (SimPO(2.5, 0.7, 0.1, 0.3), {"loss_type": "simpo", "simpo_gamma": 0.7}),
        (CPO(0.2), {"loss_type": "sigmoid"}),
        (CPO(0.2, 0.05, 0.5), {"loss_type": "sigmoid"}),
    ],
    ids=str,
)
def test_simpo_and_cpo_are_trls(objective, options):
    logps, stats = random_stats()
    sums, lengths = stats.logp_sum.view(PAIRS, 2), stats.length.view(PAIRS, 2)
    chosen, rejected = (sums / lengths if options["loss_type"] == "simpo" else sums).unbind(-1)
    state = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"), beta=objective.beta, label_smoothing=objective.label_smoothing,
        alpha=0.0, **options,
    )  # fmt: skip
    losses, *rewards = trl("cpo").cpo_loss(state, chosen, rejected)
    nll = -sums[:, 0].sum() / lengths[:, 0].sum()
    compare(logps, objective(stats, Batch(1)), losses.mean() + objective.cpo_alpha * nll, rewards)


def test_orpo_is_trls_with_the_responses_as_labels():
    logps, stats = random_stats()
    sums, lengths = stats.logp_sum.view(PAIRS, 2), stats.length.view(PAIRS, 2)
    state = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), beta=0.3)
    losses, *rewards = trl("orpo").odds_ratio_loss(state, *(sums / lengths).unbind(-1))[:3]
    nll = -sums[:, 0].sum() / lengths[:, 0].sum()
    compare(logps, ORPO(0.3)(stats, Batch(1)), nll - losses.mean(), rewards)


@pytest.mark.parametrize("p", [1e-7, 0.3, 0.5, 0.999, 1 - 1e-9])
def test_odds_are_exact_on_both_ends(p):
    from amopo_fast.training.objectives import _log1mexp

    x = torch.tensor(p, dtype=torch.float64).log()
    expected = torch.log1p(-torch.tensor(p, dtype=torch.float64)) if p < 0.5 else torch.log(-torch.expm1(x))
    assert torch.allclose(_log1mexp(x), expected, rtol=1e-12)
    assert torch.allclose(_log1mexp(x.float()), expected.float(), rtol=1e-4 if p < 0.99 else 0.2)


def tiny_model(seed):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1)
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "loss_type"), [(DPO(0.3), "sigmoid"), (IPO(0.3), "ipo"), (SFT(), "sft")], ids=["dpo", "ipo", "sft"]
)
def test_dpo_ipo_and_sft_are_trls_on_the_same_batch(tmp_path, objective, loss_type):
    """TRL's trainer on a padded batch, ours on a packed row: loss, rewards and every gradient of the model."""
    kind = trl("dpo")
    from datasets import Dataset
    from trl import DPOConfig

    from amopo_fast.demo.tokenizer import demo_tokenizer

    own = list(pairs(6))
    own = [PairTokens(p.record, p.prompts[:1], p.chosen, p.rejected, False) for p in own]
    theirs, reference = tiny_model(0), tiny_model(1)
    ours = copy.deepcopy(theirs)
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = DPOConfig(output_dir=str(tmp_path), loss_type=loss_type, beta=0.3, use_cpu=True, bf16=False, report_to=[],
                     gradient_checkpointing=False, disable_dropout=True)  # fmt: skip
    run = kind(theirs, reference, args=args, train_dataset=data, processing_class=demo_tokenizer())
    rows = [(np.concatenate([p.prompts[0], side]), len(p.prompts[0])) for side_of in ("chosen", "rejected")
            for p in own for side in [getattr(p, side_of)]]  # fmt: skip
    width = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask", "mask")}
    for row, (ids, prompt) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["mask"][row, prompt : len(ids)] = 1
    batch["completion_mask"] = batch.pop("mask")
    run.model.train()
    loss = run._compute_loss(run.model, batch, return_outputs=False)
    loss.backward()

    plan = build_plan(own)
    with torch.no_grad():
        references = score(prepare_model(reference), plan).logp_sum
    result = objective(score(prepare_model(ours), plan), Batch(1, reference_logps=references))
    result.loss.backward()
    assert torch.allclose(result.loss, loss, rtol=1e-5)
    if loss_type != "sft":
        logged = run._metrics["train"]
        for name in ("chosen", "rejected"):
            reward = float(result.columns[f"reward_{name}"].mean())
            assert reward == pytest.approx(logged[f"rewards/{name}"][-1], rel=1e-4)
        assert float(result.columns["accuracy"].mean()) == pytest.approx(logged["rewards/accuracies"][-1])
    for (name, a), (_, b) in zip(ours.named_parameters(), run.model.named_parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * max(b.grad.norm(), 1e-3), name


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "amopo"])
def test_more_dimensions_are_their_mean_and_absent_ones_count_nothing(name):
    objective = OBJECTIVES[name]()
    dimensions, absent = 3, [(0, 1), (2, 0), (2, 2)]
    logps, stats = random_stats(dimensions, absent, torch.float64)
    references = torch.randn(PAIRS * dimensions * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = objective(stats, Batch(dimensions, reference_logps=references, num_chosen_tokens=100))
    total = 0.0
    for pair in range(PAIRS):
        here = [k for k in range(dimensions) if (pair, k) not in absent]
        for k in here:
            at = slice(2 * (pair * dimensions + k), 2 * (pair * dimensions + k) + 2)
            alone = SequenceStats(*(field[at] for field in stats[:4]), stats.logps)
            one = objective(alone, Batch(1, reference_logps=references[at], num_chosen_tokens=100 / len(here)))
            total = total + one.loss / len(here)
            assert whole.columns["loss"][pair, k] * len(here) == pytest.approx(one.columns["loss"].item(), rel=1e-5)
    if not objective._nll_share():
        assert float(whole.loss.detach()) == pytest.approx(float(total.detach()) / PAIRS, rel=1e-9)
    else:
        chosen = stats.logp_sum.view(PAIRS, dimensions, 2)[..., 0].sum()
        preference = torch.nansum(whole.columns["loss"].double()) / PAIRS
        expected = preference + objective._nll_share() * -chosen / 100
        assert float(whole.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert all(torch.isnan(column[0, 1]) and not torch.isnan(column[0, 0]) for column in whole.columns.values())
    assert tuple(whole.columns) == objective.columns
    [gradient] = torch.autograd.grad(whole.loss, logps)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_amopo_is_the_kernels_loss():
    _, stats = random_stats(2, [(1, 1)])
    noise = torch.randn(PAIRS, 2, 2)
    result = AMoPO(1.5, 0.5)(stats, Batch(2, 3, noise))
    expected = amopo_loss(stats, order="alternating", num_dimensions=2, beta=1.5, gamma=0.5, noise=noise, num_pairs=3)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.columns["weight"].nan_to_num(), expected.weights)
    shares = torch.nansum(result.columns["loss"]) / 3
    assert float(shares) == pytest.approx(float(expected.loss.detach()), rel=1e-6)


def losses_of(run):
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "dpo", "ipo", "sft"])
def test_any_split_into_micro_batches_gives_the_same_losses(tmp_path, name):
    options = {"objective": name, "save_strategy": "no", "cpo_alpha": 0.5} if name in ("simpo", "cpo") else {
        "objective": name, "save_strategy": "no"}  # fmt: skip
    found = []
    for folder, budget in (("one", 10_000), ("several", 60)):
        run = trainer(tmp_path / folder, budget, **options)
        run.model.config.attention_dropout = 0.0
        for module in run.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        found.append(losses_of(run))
    assert found[0] == pytest.approx(found[1], rel=2e-4) and len(set(found[0])) > 1


# the reference model


def test_a_full_runs_reference_is_the_model_before_its_first_step_and_survives_a_resume(tmp_path):
    run = trainer(tmp_path, objective="dpo", eval_strategy="no")
    before = copy.deepcopy(run.model).eval()
    assert losses_of(run)[0] == pytest.approx(np.log(2), abs=0.2)  # dropout alone parts the two
    [file] = (tmp_path / "reference").iterdir()
    plan = build_plan(list(pairs(14)))
    expected = score(before, plan).logp_sum.view(14, 2, 2)
    assert np.allclose(np.load(file), expected.detach().numpy(), rtol=1e-5)
    written = file.stat().st_mtime_ns
    resumed = trainer(tmp_path, objective="dpo", eval_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
    file.unlink()
    with pytest.raises(CheckpointError, match="log-probs of the reference model are not in"):
        trainer(tmp_path, objective="dpo").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_adapters_reference_is_its_base_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    run = trainer(tmp_path, objective="dpo", save_strategy="no")
    base = copy.deepcopy(run.model).eval()
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    config = AMoPOConfig(output_dir=str(tmp_path), objective="dpo", use_cpu=True, report_to=[])
    lora = type(run)(adapted.eval(), config, dimensions=["a", "b"], eval_dataset=list(pairs(5)))
    found = lora.evaluate()
    plan = build_plan(list(pairs(5)))
    with torch.no_grad():
        result = DPO()(score(adapted, plan), Batch(2, reference_logps=score(base, plan).logp_sum))
    assert found["eval_margin/a"] == pytest.approx(float(result.columns["margin"][:, 0].mean()), rel=1e-4)
    assert found["eval_margin/a"] != 0 and not (tmp_path / "reference").exists()
    with pytest.raises(ValueError, match="compares with the model before its first step"):
        trainer(tmp_path, objective="dpo").evaluate(list(pairs(3)))


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "kto"}, "objective='kto'; choose one of amopo, simpo"),
        ({"objective": "dpo", "gamma": 1.0}, "gamma=1.0 has no effect with objective dpo: it belongs to amopo, simpo"),
        ({"objective": "simpo", "weighting": "mean"}, "weighting=mean has no effect with objective simpo"),
        ({"objective": "sft", "beta": 0.1}, "beta=0.1 has no effect with objective sft"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with objective amopo: it belongs to simpo, cpo"),
        ({"objective": "cpo", "label_smoothing": 0.5}, "from 0 to below 0.5"),
        ({"objective": "dpo", "beta": 0.0}, "beta=0.0 must be positive"),
    ],
)
def test_an_option_of_another_objective_is_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_defaults_are_each_objectives_own(tmp_path):
    for name, kind in OBJECTIVES.items():
        config = AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, objective=name)
        assert objective_of(config, ("a",)) == kind()
    assert AMoPOConfig(output_dir=str(tmp_path), use_cpu=True).beta == 0.8
    json.dumps(AMoPOConfig(output_dir=str(tmp_path), use_cpu=True).to_dict(), default=str)

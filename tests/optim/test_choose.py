"""Which optimizer a run gets, what is refused, and training through AMoPOTrainer with the step in the backward pass."""


import pytest
import torch
from run_training import trainer
from safetensors.torch import load_file

from amopo_fast.optim import AdamW, choose_optimizer
from amopo_fast.training.config import AMoPOConfig


def config(tmp_path, **options):
    return AMoPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def linear(dtype):
    return torch.nn.Linear(4, 4).to(dtype)


@pytest.mark.parametrize("optim, states", [("adamw_torch_fused", "fp32"), ("adamw_torch", "fp32"),
                                           ("adamw_torch_8bit", "8bit"), ("adamw_torch_4bit", "4bit")])  # fmt: skip
def test_bfloat16_weights_are_rounded_stochastically(tmp_path, optim, states):
    cls, options = choose_optimizer(config(tmp_path, optim=optim), linear(torch.bfloat16), 3)
    assert cls is AdamW and options["states"] == states and options["stochastic_rounding"]
    assert not options.get("in_backward")


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_low_bit_states_of_float32_weights_need_no_torchao(tmp_path, optim):
    cls, options = choose_optimizer(config(tmp_path, optim=optim), linear(torch.float32), 1)
    assert cls is AdamW and options["states"] == optim.rsplit("_")[-1]
    plain = config(tmp_path, optim=optim, weight_precision="bf16")
    assert choose_optimizer(plain, linear(torch.bfloat16), 1)[1]["stochastic_rounding"] is False


def test_float32_weights_and_frozen_bfloat16_leave_the_choice_to_trainer(tmp_path):
    assert choose_optimizer(config(tmp_path), linear(torch.float32), 1) is None
    assert choose_optimizer(config(tmp_path), linear(torch.bfloat16).requires_grad_(False), 1) is None


def test_a_model_of_another_precision_than_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weight_precision=fp32, but the model given has bfloat16 weights"):
        choose_optimizer(config(tmp_path, weight_precision="fp32"), linear(torch.bfloat16), 1)
    with pytest.raises(ValueError, match="weight_precision=bf16_stochastic, but .* has float32 weights"):
        choose_optimizer(config(tmp_path, weight_precision="bf16_stochastic"), linear(torch.float32), 1)


def test_under_fsdp_low_bit_states_without_torchao_are_refused_by_name(tmp_path, monkeypatch):
    args = config(tmp_path, optim="adamw_torch_8bit", learning_rate=1e-3)
    args.fsdp = True
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="under FSDP or DeepSpeed is torchao's, .* pip install torchao"):
        choose_optimizer(args, linear(torch.float32), 1)


def test_under_fsdp_torchaos_optimizer_is_told_to_round_stochastically(tmp_path):
    pytest.importorskip("torchao")
    from transformers import Trainer

    args = config(tmp_path, optim="adamw_torch_8bit", learning_rate=1e-3)
    args.fsdp = True
    assert choose_optimizer(args, linear(torch.bfloat16), 1) is None
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls([torch.nn.Parameter(torch.zeros(4))], **options).bf16_stochastic_round
    args.optim = "adamw_torch_fused"
    with pytest.raises(ValueError, match="under FSDP or DeepSpeed does not round stochastically"):
        choose_optimizer(args, linear(torch.bfloat16), 1)


def test_plain_bfloat16_only_on_request_and_with_an_explanation(tmp_path, caplog):
    with pytest.raises(ValueError, match="adafactor does not round stochastically"):
        choose_optimizer(config(tmp_path, optim="adafactor"), linear(torch.bfloat16), 1)
    plain = config(tmp_path, optim="adafactor", weight_precision="bf16")
    assert choose_optimizer(plain, linear(torch.bfloat16), 1) is None
    assert "0.5 % of the weights" in caplog.text


@pytest.mark.parametrize(
    "options, micro_batches, message",
    [
        ({}, 2, "raise tokens_per_micro_batch or lower pairs_per_step"),
        ({"fp16": True}, 1, "loss scaler"),
        ({"fsdp": True}, 1, "FSDP and DeepSpeed"),
        ({"ranks": 2}, 1, "weights would diverge"),
    ],
)
def test_step_in_backward_is_refused_with_the_reason(tmp_path, monkeypatch, options, micro_batches, message):
    args = config(tmp_path, optim_in_backward="adamw")
    if "ranks" in options:
        monkeypatch.setattr(type(args), "world_size", 2)
    for name in set(options) - {"ranks"}:
        setattr(args, name, options[name])
    with pytest.raises(ValueError, match=message):
        choose_optimizer(args, linear(torch.float32), micro_batches)


def test_bad_options_are_named(tmp_path):
    for option in ("weight_precision", "optim_in_backward", "clip_in_backward"):
        with pytest.raises(ValueError, match=f"{option}='best'; choose one of"):
            config(tmp_path, **{option: "best"})


def test_training_equals_trainers_own_optimizer_bit_for_bit(tmp_path, caplog):
    """Through AMoPOTrainer with its schedule, decay groups and checkpoint; then resumed from the middle."""
    runs = {}
    for name, options in (("ordinary", {}), ("inside", {"optim_in_backward": "adamw"})):
        run = trainer(tmp_path / name, 10**6, max_grad_norm=0.0, weight_decay=0.1, **options)
        run.train()
        run.save_model()
        runs[name] = run
    logs = [[(x["loss"], x["learning_rate"], x["grad_norm"]) for x in r.state.log_history if "loss" in x]
            for r in runs.values()]  # fmt: skip
    assert len(logs[0]) == 8 and [row[:2] for row in logs[0]] == [row[:2] for row in logs[1]]
    assert [row[2] for row in logs[0]] == pytest.approx([row[2] for row in logs[1]], rel=1e-5)

    resumed = trainer(tmp_path / "inside", 10**6, max_grad_norm=0.0, weight_decay=0.1, optim_in_backward="adamw")
    resumed.train(resume_from_checkpoint=str(tmp_path / "inside" / "checkpoint-4"))
    resumed.save_model(str(tmp_path / "resumed"))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ordinary", "inside", "resumed")]
    for other in files[1:]:
        assert files[0].keys() == other.keys() and all(torch.equal(files[0][k], other[k]) for k in other)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_4bit"])
def test_bfloat16_with_low_bit_states_resumes_bit_for_bit_and_says_how_it_clips(tmp_path, optimizer, caplog):
    options = {"optim_in_backward": optimizer, "max_grad_norm": 0.1, "gradient_checkpointing": True, "keep_layers": 1}

    def run(folder):
        run = trainer(folder, 10**6, **options)
        run.model.to(torch.bfloat16)
        return run

    whole = run(tmp_path / "whole")
    whole.train()
    assert "previous step's global norm" in caplog.text
    layers = whole.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    losses = [[x["loss"] for x in r.state.log_history if "loss" in x] for r in (whole, resumed)]
    assert losses[0] == losses[1]


def test_more_kept_layers_than_layers_are_refused(tmp_path):
    run = trainer(tmp_path, 10**6, gradient_checkpointing=True, keep_layers=3)
    with pytest.raises(ValueError, match="keep_layers=3, but 2 layers are checkpointed"):
        run.train()

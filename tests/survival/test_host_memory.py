"""Runs of AMoPOTrainer with weights and optimizer states in host memory are those on the device, resumes included."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from small_run import V, small_model, small_pairs, small_trainer
from transformers import Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from amopo_fast.errors import NumbersError, OptionError
from amopo_fast.memory.estimate import FILLED, Row, Setup, cache_bytes, estimate
from amopo_fast.memory.profile import meta_model
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.streaming import host_bytes, stream_weights, streamed_of
from amopo_fast.packing.schedule import PairSizes
from amopo_fast.training import loading
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.epochs import costs, schedule_of
from amopo_fast.training.host_memory import refuse_in_host_memory

DEVICE = {"optim_in_backward": "adamw_8bit", "tokens_per_micro_batch": 10**6, "num_train_epochs": 1}
HOST = {**DEVICE, "weights": "host", "optimizer_states": "host"}


def run_of(folder, dtype=torch.float32, **options):
    """Four layers: more than slots. Two steps, a checkpoint after each, an evaluation at the end."""
    model = small_model(num_hidden_layers=4).to(dtype)
    return small_trainer(folder, model=model, pairs=small_pairs(8), save_steps=1, **options)


def what_ended(folder):
    last = folder / "checkpoint-2"
    return load_file(last / "model.safetensors"), torch.load(last / "optimizer.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def evaluations(run):
    return [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16_stochastic"])
def test_a_run_and_its_resume_are_those_of_the_device(tmp_path, precision):
    options = {"weight_precision": precision}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    device = run_of(tmp_path / "device", dtype, **DEVICE, gradient_checkpointing=True, **options)
    device.train()
    host = run_of(tmp_path / "host", dtype, **HOST, **options)
    assert host.streamed is not None and host.args.optimizer_states == "host"
    host.train()
    host.save_final()
    expected = what_ended(tmp_path / "device")
    assert same(expected, what_ended(tmp_path / "host"))
    assert same(expected[0], load_file(tmp_path / "host" / "model.safetensors"))
    assert evaluations(device) == evaluations(host) != []
    resumes = [("device", HOST), ("host", HOST), ("host", {**DEVICE, "optimizer_states": "host"})]
    for number, (saved_on, kind) in enumerate(resumes if precision == "fp32" else resumes[:1]):
        folder = tmp_path / f"resumed {number}"
        resumed = run_of(folder, dtype, **kind, gradient_checkpointing=True, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / saved_on / "checkpoint-1"))
        assert same(expected, what_ended(folder)), number


def mixture():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16,
             "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"router_aux_loss_coef": 0.01}, {"compile_layers": True}, {"objective": "dpo"}, {"layout": "separate"}]
)
def test_options_that_use_layers_otherwise_go_with_it(tmp_path, options):
    ends = []
    for kind in ({**DEVICE, "gradient_checkpointing": True}, HOST):
        model = mixture() if "router_aux_loss_coef" in options else small_model(num_hidden_layers=4)
        run = small_trainer(tmp_path / str(len(ends)), model=model, save_strategy="no", **kind, **options)
        run.train()
        ends.append({name: value.clone() for name, value in run.model.state_dict().items()})
    assert same(*ends)


def test_a_weight_that_is_not_finite_ends_the_run(tmp_path):
    run = run_of(tmp_path, **HOST)
    with torch.no_grad():
        run.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumbersError, match="a weight is not finite before training begins .*layers.1.mlp.up_proj"):
        run.train()


def test_a_step_sees_a_streamed_weight_that_is_not_finite(tmp_path):
    """It lies in host memory when the guard looks, which reads what the device found."""
    run = run_of(tmp_path, **HOST)
    largest = run.streamed.largest
    run.streamed.largest = lambda: [*largest(), torch.tensor(torch.inf)]
    with pytest.raises(NumbersError, match="step 1: a weight is not finite"):
        run.train()


def test_a_folder_is_loaded_into_host_memory_that_was_taken_before(tmp_path, monkeypatch):
    model = small_model(num_hidden_layers=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    args = AMoPOConfig(str(tmp_path), use_cpu=True, weight_precision="bf16_stochastic", **HOST)
    calls = []

    def told(name):
        call = getattr(loading, name)
        monkeypatch.setattr(loading, name, lambda *given: calls.append(name) or call(*given))

    told("memory_for")
    told("load_model")
    loaded = loading.load_for_training(ModelConfig(str(tmp_path / "model")), args, None, adapter=False)
    assert calls == ["memory_for", "load_model"]
    assert same(dict(model.state_dict()), dict(loaded.state_dict()))
    assert streamed_of(loaded).nbytes == sum(host_bytes(model))
    monkeypatch.setattr(loading, "host_bytes", lambda model: [1 << 60])
    with pytest.raises(RuntimeError, match=r"weights of the decoder layers need 1073741824.0 GiB .* after 0.0 GiB"):
        loading.load_for_training(ModelConfig(str(tmp_path / "model")), args, None, adapter=False)
    assert calls[2:] == ["memory_for"]


@pytest.mark.parametrize("name", ["weights", "optimizer_states"])
def test_adapters_ranks_and_sharding_are_refused_by_name(tmp_path, name, monkeypatch):
    args = AMoPOConfig(str(tmp_path), use_cpu=True, **DEVICE, **{name: "host"})
    with pytest.raises(OptionError, match=f"{name}=host: an adapter's states are small.*leave {name} out") as refused:
        loading.load_for_training(ModelConfig("nothing is loaded"), args, None, adapter=True)
    assert refused.value.option == name
    with pytest.raises(OptionError, match=f"{name}=host: an adapter"):
        small_trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), **DEVICE, **{name: "host"})
    found = ((args, "fsdp", True, "FSDP and DeepSpeed place"), (type(args), "world_size", 2, r"2 ranks \(DDP\)"))
    for owner, attribute, value, message in found:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            with pytest.raises(OptionError, match=f"{name}=host: {message}"):
                refuse_in_host_memory(args)


@pytest.mark.parametrize(
    "options", [{"keep_layers": 1, "gradient_checkpointing": True},
                {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
                {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}],
)  # fmt: skip
def test_layers_that_are_not_recomputed_are_refused(tmp_path, options):
    with pytest.raises(OptionError, match="beside weights=host: each layer leaves the device") as refused:
        AMoPOConfig(str(tmp_path), use_cpu=True, **HOST, **options)
    assert refused.value.option == "weights"


def test_checkpointing_is_switched_on_and_said(tmp_path, caplog):
    args = AMoPOConfig(str(tmp_path), use_cpu=True, **HOST)
    assert getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    assert "gradient checkpointing is switched on" in caplog.text


@pytest.mark.parametrize("budget, said", [(330, "pairs_per_step=3 every row still fits"), (230, ""), (60, "")])
def test_how_many_pairs_a_step_holds_and_could_hold_is_said(tmp_path, budget, said):
    computed = np.array([90, 100, 30, 120, 110])
    sizes = PairSizes(*(computed,) * 5, longest=0 * computed)
    args = AMoPOConfig(str(tmp_path), use_cpu=True, pairs_per_step=2, tokens_per_micro_batch=budget,
                       optim_in_backward="adamw_8bit")  # fmt: skip
    *_, line = costs(args, schedule_of(args, sizes)).splitlines()
    assert line.startswith("a step is one row of 2 pairs") and said in line and bool(said) == (";" in line)
    separate = replace(sizes, longest=computed // 2)  # two sequences a pair, each padded to the longest of all
    assert (costs(args, schedule_of(args, separate)).splitlines()[-1] == line) == (budget != 330)
    args.optim_in_backward = ""
    assert costs(args, schedule_of(args, sizes)) == schedule_of(args, sizes).describe()


def test_slots_fill_what_the_estimate_leaves_of_a_gpu():
    """32B with all of it in host memory: 1.2 GiB of the head's probabilities and layers of 0.91 GiB."""
    sizes_32b = dict(num_hidden_layers=64, hidden_size=5120, intermediate_size=27648, num_attention_heads=40,
                     num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False)  # fmt: skip
    shape = Qwen2Config(**sizes_32b)
    row = Row(tokens=8192, label_tokens=4096, kv_tokens=16384)
    setup = Setup(states="4bit", in_backward=True, host_states=True, host_weights=True)
    sizes = host_bytes(meta_model(shape))
    found = {}
    for gpu in (12.0, 23.5, 79.0, 139.0):
        slots = found[gpu] = estimate(shape, row, setup).slots_on(int(gpu * 2**30))
        assert slots == estimate(shape, row, replace(setup, weight_slots=5)).slots_on(int(gpu * 2**30))
        prediction = estimate(shape, row, replace(setup, weight_slots=slots, head_cache=cache_bytes(shape, row)))
        room = FILLED * int(gpu) * 2**30 - prediction.needed
        assert slots in (2, 64) or 0 <= room < max(sizes)
    assert found[12.0] == 2 < found[23.5] < 8 and 40 < found[79.0] < 64 == found[139.0]


def test_a_loaded_model_has_the_slots_that_fit_and_its_estimate_counts_them(tmp_path):
    run = small_trainer(tmp_path, model=stream_deep(3), pairs=small_pairs(8), **HOST)
    _, setup = loading.run_of(run.args, run.model, run.train_dataset.pairs, run._batches.epoch)
    assert setup.weight_slots == run.streamed.slots == 3


def stream_deep(slots):
    model = small_model(num_hidden_layers=4)
    stream_weights(model, torch.device("cpu"), slots=slots)
    return model

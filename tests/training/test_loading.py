"""Loading without a second copy, precision, adapters through AMoPOTrainer, merging, and the check before a run."""

import json

import pytest
import torch
from demo_folder import demo_folder
from run_training import pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from amopo_fast.cli import main
from amopo_fast.cli.train import rows_as_begun
from amopo_fast.demo.tokenizer import demo_tokenizer
from amopo_fast.memory.estimate import Row, Setup
from amopo_fast.memory.gpus import GIB, GPUS
from amopo_fast.memory.parameters import parameters_of
from amopo_fast.memory.preflight import DoesNotFit, Room, require_fit
from amopo_fast.memory.profile import LiveBytes
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_model
from amopo_fast.models.precision import weights_dtype
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.loading import load_for_training
from amopo_fast.training.resume import options_of

SHAPE = Qwen2Config(vocab_size=1152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE).save_pretrained(path)
    demo_tokenizer().save_pretrained(path)
    return path


def args(path, **options):
    return AMoPOConfig(output_dir=str(path), use_cpu=True, disable_tqdm=True, **options)


@pytest.mark.parametrize("random_weights", [True, False])
def test_a_model_is_made_once_in_its_dtype(tmp_path, random_weights):
    big = Qwen2Config(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    big.save_pretrained(tmp_path)
    if not random_weights:
        AutoModelForCausalLM.from_config(big, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), random_weights=random_weights)
    with LiveBytes() as live:
        model = load_model(config, args(tmp_path), torch.bfloat16)
    weights = sum(p.numel() * 2 for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    largest = max(p.numel() * 4 for p in model.parameters())
    assert live.peak <= weights + 2 * largest  # one tensor at a time may pass through float32


def test_random_weights_depend_on_the_seed_and_take_overrides(tmp_path, folder):
    def weight(seed, **options):
        config = ModelConfig(str(folder), random_weights=True, **options)
        return load_model(config, args(tmp_path, seed=seed), torch.float32).lm_head.weight

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))
    assert weight(1, config_overrides="vocab_size=31,num_hidden_layers=3").shape == (31, 32)
    with pytest.raises(ValueError, match="no effect without random_weights"):
        load_model(ModelConfig(str(folder), config_overrides="vocab_size=3"), args(tmp_path), torch.float32)


def test_precision_policy(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    def dtype(policy, device=cuda, adapter=False, fits=True):
        return weights_dtype(policy, device=device, adapter=adapter, fp32_fits=lambda: fits)

    assert dtype("auto", cpu, fits=False) == dtype("auto") == dtype("fp32", fits=False) == torch.float32
    assert dtype("auto", fits=False) == dtype("auto", adapter=True) == torch.bfloat16
    assert dtype("bf16_stochastic", cpu) == dtype("bf16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert dtype("auto", fits=False) == torch.float32


def test_what_does_not_fit_is_refused_with_a_flag_that_fixes_it():
    shape = Qwen2Config(vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                        num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
    row = Row(8192, 4096, 16384)
    with pytest.raises(DoesNotFit) as refused:
        require_fit("qwen", shape, row, Setup(weights="fp32"), Room(GPUS["h200"], 512 * GIB))
    message = str(refused.value)
    assert message.startswith("qwen: this run needs about 496.8 GiB") and "139.0 GiB are free" in message
    assert "optimizer states 244.1" in message and "--optim_in_backward adamw_8bit" in message
    four = Setup(states="4bit", in_backward=True)
    assert require_fit("qwen", shape, row, four, Room(GPUS["h200"], 0)).peak < 139 * GIB  # it pins nothing


def test_the_check_runs_before_loading_on_a_gpu(tmp_path, folder, monkeypatch, capsys):
    """With a device that claims to be a GPU: nothing is loaded, the message names the model."""
    run = args(tmp_path, pairs_per_step=4)
    monkeypatch.setattr(type(run), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("amopo_fast.training.loading.load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr("amopo_fast.memory.preflight.cheapest_change", lambda *a: None)
    with pytest.raises(DoesNotFit, match="no change of optimizer"):
        load_for_training(ModelConfig(str(folder)), run, list(pairs(6)), adapter=False)
    monkeypatch.setattr("amopo_fast.training.loading.load_model", lambda config, args, dtype: dtype)
    run.memory_check = False
    assert load_for_training(ModelConfig(str(folder)), run, list(pairs(6)), adapter=False) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    run.memory_check = True
    assert load_for_training(ModelConfig(str(folder)), run, list(pairs(6)), adapter=False) == torch.float32
    assert "GB/s" not in capsys.readouterr().out
    monkeypatch.setattr("amopo_fast.memory.gpus.measure_copies", lambda device: (5e10, 4e10))
    monkeypatch.setattr("amopo_fast.memory.preflight._LONGEST", 500)
    run.optim_in_backward, run.optimizer_states, run.weight_precision = "adamw_8bit", "host", "bf16_stochastic"
    assert load_for_training(ModelConfig(str(folder)), run, list(pairs(6)), adapter=False) == torch.bfloat16
    said = capsys.readouterr().out
    assert "back, at measured 50 and 40 GB/s" in said
    assert "computed tokens would fit too, which is a step of pairs_per_step=6 pairs; this run's has 4" in said


def test_on_a_cpu_too_and_the_default_row_follows_the_free_memory(tmp_path, folder, monkeypatch, capsys):
    """A run that a small machine would be killed for is refused; rows that nobody chose are shortened, and said."""
    big = tmp_path / "big"
    Qwen2Config(vocab_size=1152, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
                num_key_value_heads=2, tie_word_embeddings=False).save_pretrained(big)  # fmt: skip
    demo_tokenizer().save_pretrained(big)
    data = list(pairs(200))
    monkeypatch.setattr("amopo_fast.memory.preflight.cheapest_change", lambda *a: None)  # seconds of other tests

    def load(free, **options):
        capsys.readouterr()
        run = args(tmp_path, pairs_per_step=200, **options)
        monkeypatch.setattr("amopo_fast.training.loading.free_host_memory", lambda: free)
        monkeypatch.setattr("amopo_fast.training.loading.load_model", lambda config, args, dtype: dtype)
        assert load_for_training(ModelConfig(str(big)), run, data, adapter=False) == torch.float32
        return run.row_tokens, run.tokens_per_micro_batch, capsys.readouterr().out

    needed = 16 * sum(p.numel for p in parameters_of(Qwen2Config.from_pretrained(big)))  # weights, gradients, states
    assert load(1000 * GIB) == (8192, None, "")  # so much that nothing need be estimated
    tokens, chosen, said = load(int(1.7 * needed))
    assert 512 <= tokens < 8192 and chosen == tokens
    assert f"tokens_per_micro_batch: {tokens}, as {1.7 * needed / GIB:.1f} GiB are free" in said
    assert "weights in float32; about" in said
    with pytest.raises(DoesNotFit, match=r"this run needs about .* GiB of memory .* computed tokens .* GiB are free; "):
        load(needed // 2)
    with pytest.raises(DoesNotFit):  # a row that was chosen is not shortened
        load(int(1.7 * needed), tokens_per_micro_batch=8192)
    assert load(needed // 2, memory_check=False) == (8192, None, "")


def test_a_resume_goes_on_with_the_rows_that_were_chosen(tmp_path, monkeypatch):
    saved = {"fingerprint": options_of(args(tmp_path, tokens_per_micro_batch=1024), torch.nn.Linear(1, 1))}
    monkeypatch.setattr("amopo_fast.training.resume.read_marker", lambda checkpoint: saved)
    for given, checkpoint, tokens in ((None, tmp_path, 1024), (2048, tmp_path, 2048), (None, None, None)):
        run = args(tmp_path, tokens_per_micro_batch=given)
        rows_as_begun(run, checkpoint)
        assert run.tokens_per_micro_batch == tokens


def lora_trainer(folder, tmp_path, model=None, target_modules="all-linear", **options):
    from peft import LoraConfig

    from amopo_fast.training.trainer import AMoPOTrainer

    adapter = LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM")
    options = {"learning_rate": 1e-2, "pairs_per_step": 4, "num_train_epochs": 2, "save_strategy": "no", **options}
    return AMoPOTrainer(model or str(folder), args(tmp_path, **options), dimensions=["first", "second"],
                        train_dataset=list(pairs(8)), peft_config=adapter,
                        processing_class=AutoTokenizer.from_pretrained(folder))  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"optim_in_backward": "adamw", "tokens_per_micro_batch": 10**6,
                                          "gradient_checkpointing": True}])  # fmt: skip
def test_lora_trains_saves_and_merges_into_a_model_with_the_same_logits(tmp_path, folder, options):
    trainer = lora_trainer(folder, tmp_path / "run", **options)
    assert not trainer.model.get_base_model().lm_head.weight.requires_grad
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.arange(12)[None]
    trained = trainer.model.eval()(input_ids=ids).logits
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    assert (base - trained).abs().max() > 1e-3  # there was something to merge
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1  # never overwrites
    assert main(["merge", str(folder), str(tmp_path / "other")]) == 1


@pytest.mark.parametrize("target_modules", [["q_proj", "lm_head"], ["lm_head"]])
def test_an_adapter_on_the_head_is_refused(tmp_path, folder, target_modules):
    with pytest.raises(ValueError, match="leave lm_head out of target_modules"):
        lora_trainer(folder, tmp_path, target_modules=target_modules)


def test_four_bit_model_under_an_adapter(tmp_path, folder):
    """bitsandbytes decodes on the CPU too; its kernels and speed need a GPU."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, device_map={"": "cpu"},
                                                 dtype=torch.float32)  # fmt: skip
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and type(model.lm_head) is torch.nn.Linear
    trainer = lora_trainer(folder, tmp_path, model=model, gradient_checkpointing=True)
    code = layer.weight.detach().clone()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]
    assert torch.equal(layer.weight, code)


def test_four_bits_need_an_adapter():
    with pytest.raises(ValueError, match="load_in_4bit needs --use_peft true"):
        ModelConfig("x", load_in_4bit=True)


def test_dry_run_prints_prediction_and_measurement(tmp_path, capsys):
    demo_folder(tmp_path / "model")
    side = {"helpfulness": 5, "correctness": 4, "instruction_following": 5}
    records = [
        {"prompt": f"Name number {i}.", "chosen": {"response": f"Item {i}, of course. " * (i + 1), **side},
         "rejected": {"response": "No.", **side}}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    command = ["train", "--model_name_or_path", str(tmp_path / "model"), "--train_data", str(tmp_path / "pairs.json"),
               "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", "true", "--pairs_per_step", "3",
               "--gradient_checkpointing", "true", "--optim_in_backward", "adamw", "--dry_run", "true"]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "longest micro-batch" in shown and "computed tokens/s" in shown
    ratio = float(shown.split("prediction / measurement ")[1].split(";")[0])
    assert 0.85 < ratio < 1.15  # of 6 MB; tests/memory holds the parts to 3 %
    assert not list((tmp_path / "run").glob("**/*.safetensors"))

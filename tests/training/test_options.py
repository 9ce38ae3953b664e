"""Every field of a run's configuration changes what its name says, or is refused away from its default."""

import dataclasses

import pytest
import torch
from run_training import V, pairs
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from amopo_fast.errors import OptionError
from amopo_fast.models.choice import choice_of
from amopo_fast.training import arguments
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.console import console_trainer
from amopo_kernels.dispatch import runs

BASE = {"pairs_per_step": 4, "tokens_per_micro_batch": 400, "max_steps": 3, "use_cpu": True, "learning_rate": 1e-2,
        "disable_tqdm": True, "logging_strategy": "steps", "save_strategy": "no"}  # fmt: skip
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}
SAVES = {"save_strategy": "steps", "save_steps": 1}
WORKERS = {"dataloader_num_workers": 1}

# option: (value, what it must change of a run, other options on both sides)
ACTS = {
    "output_dir": ("elsewhere", "output", {}),
    "per_device_train_batch_size": (1, "rows", {"pairs_per_step": None}),
    "gradient_accumulation_steps": (2, "rows", {"pairs_per_step": None, "per_device_train_batch_size": 2}),
    "num_train_epochs": (2, "steps", {"max_steps": -1, "num_train_epochs": 1.0}),
    "max_steps": (2, "steps", {}),
    "learning_rate": (1e-3, "losses", {}),
    "lr_scheduler_type": ("constant_with_warmup", "rates", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, "rates", {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": (2, "rates", {}),
    "optim": ("adafactor", "optimizer", {}),
    "weight_decay": (0.5, "weights", {}),
    "adam_beta1": (0.5, "weights", {}),
    "adam_beta2": (0.5, "weights", {}),
    "adam_epsilon": (1.0, "weights", {}),
    "max_grad_norm": (1e-3, "weights", {}),
    "bf16": (True, "losses", {"bf16": False}),
    "gradient_checkpointing": (True, "checkpointing", {}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, "checkpointing_options",
                                      {"gradient_checkpointing": True}),
    "activation_checkpointing": (True, "checkpointing", {}),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, "checkpointing_options",
                                        {"gradient_checkpointing": True}),
    "keep_layers": (1, "kept", {"gradient_checkpointing": True}),
    "logging_strategy": ("no", "logged", {}),
    "logging_steps": (2, "logged", {}),
    "logging_first_step": (True, "logged", {"logging_steps": 2}),
    "log_level": ("error", "verbosity", {}),
    "report_to": (["tensorboard"], "callbacks", {}),
    "eval_strategy": ("epoch", "evaluations", {"max_steps": 5}),
    "eval_steps": (1, "evaluations", EVALUATES),
    "eval_delay": (3, "evaluations", EVALUATES),
    "eval_on_start": (True, "evaluations", EVALUATES),
    "per_device_eval_batch_size": (2, "evaluation_rows", EVALUATES),
    "load_best_model_at_end": (True, "best", {**EVALUATES, "save_strategy": "steps", "save_steps": 2}),
    "metric_for_best_model": ("accuracy/mean", "best", {**EVALUATES, "save_strategy": "best",
                                                "metric_for_best_model": "loss"}),
    "greater_is_better": (True, "best", {**EVALUATES, "save_strategy": "best", "metric_for_best_model": "loss",
                                         "max_steps": 4, "learning_rate": 1e-3}),
    "save_strategy": ("epoch", "saved", {}),
    "save_steps": (2, "saved", SAVES),
    "save_total_limit": (1, "saved", SAVES),
    "save_only_model": (True, "files", SAVES),
    "full_determinism": (True, "deterministic", {}),
    "seed": (7, "losses", {}),
    "skip_memory_metrics": (False, "metrics", {}),
    "debug": ("underflow_overflow", "hooks", {}),
    "dataloader_num_workers": (1, "loader", {}),
    "dataloader_persistent_workers": (True, "loader", WORKERS),
    "dataloader_prefetch_factor": (4, "loader", WORKERS),
    "dataloader_multiprocessing_context": ("fork", "loader", WORKERS),
    "objective": ("simpo", "losses", {}),
    "beta": (2.0, "losses", {}),
    "gamma": (0.5, "losses", {}),
    "label_smoothing": (0.2, "losses", {"objective": "simpo"}),
    "cpo_alpha": (0.5, "losses", {"objective": "simpo"}),
    "weighting": ("uniform", "losses", {}),
    "tau": (0.1, "losses", {"weighting": "worst_first"}),
    "dimension_weights": ({"second": 9.0}, "losses", {}),
    "compat": ("upstream", "losses", {}),
    "sft_coef": (0.5, "losses", {}),
    "pairs_per_step": (2, "rows", {}),
    "tokens_per_micro_batch": (120, "rows", {}),
    "kernel_backend": ("chunked", "backends", {}),
    "attention_backend": ("sdpa", None, {}),  # the only one of a CPU
    "layout": ("separate", "layout", {}),
    "compile_layers": (True, "layers", {}),
    "weight_precision": ("bf16_stochastic", "dtype", {}),
    "optim_in_backward": ("adamw_8bit", "optimizer", {"pairs_per_step": 1}),
    "clip_in_backward": ("per_tensor", "optimizer", {"pairs_per_step": 1, "optim_in_backward": "adamw"}),
    "optimizer_states": ("host", "optimizer", {"pairs_per_step": 1, "optim_in_backward": "adamw"}),
    "weights": ("host", "streamed", {"pairs_per_step": 1, "optim_in_backward": "adamw"}),
}  # fmt: skip
if not hasattr(AMoPOConfig, "activation_checkpointing"):  # transformers < 5.24 has gradient_checkpointing alone
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        del ACTS[name]
# What a CPU, one process or a test without a network cannot show, and where it acts.
ELSEWHERE = {
    "fp16": "GPUs", "tf32": "GPUs", "torch_empty_cache_steps": "GPUs", "use_liger_kernel": "GPUs",
    "liger_kernel_config": "GPUs (tests/models/test_faster_layers.py)", "logits_cache_gib": "the Triton backends",
    "router_aux_loss_coef": "mixtures of experts (tests/training/test_routers.py)",
    "dataloader_pin_memory": "GPUs", "memory_check": "GPUs (tests/memory/test_on_gpu.py)",
    "eval_accumulation_steps": "GPUs: when a table is moved to the host",
    "log_on_each_node": "nodes", "log_level_replica": "ranks", "ddp_find_unused_parameters": "ranks",
    "ddp_bucket_cap_mb": "ranks", "ddp_broadcast_buffers": "ranks", "ddp_static_graph": "ranks",
    "ddp_backend": "ranks (tests/survival/test_distributed.py)", "ddp_timeout": "ranks",
    "fsdp": "GPUs (tests/survival/test_fsdp_gpu.py)", "fsdp_config": "GPUs", "deepspeed": "GPUs",
    "optim_args": "optimizers of torchao, galore_torch and others",
    "optim_target_modules": "the optimizers of galore_torch and apollo_torch", "use_cpu": "machines with a GPU",
    "run_name": "the trackers", "project": "trackio", "trackio_space_id": "trackio", "trackio_bucket_id": "trackio",
    "trackio_static_space_id": "trackio", "push_to_hub": "the Hub", "hub_token": "the Hub", "hub_model_id": "the Hub",
    "hub_private_repo": "the Hub", "hub_always_push": "the Hub", "hub_revision": "the Hub",
    "resume_from_checkpoint": "`amopo-fast train` (tests/survival)",
    "on_changed_option": "a resume (tests/survival/test_resume_policy.py)", "dry_run": "`amopo-fast train` (tests/cli)",
    "save_dtype": "`amopo-fast train` (tests/training/test_loading.py)",
    "restore_callback_states_from_checkpoint": "callbacks that a Python program gives",
    "disable_tqdm": "terminals", "do_train": "true is what `train` does in any case",
    "do_eval": "eval_strategy sets it",
}  # fmt: skip


def configured(folder, **options):
    return AMoPOConfig(**{"output_dir": str(folder), **BASE, **options})


def test_the_table_holds_every_field():
    fields = {each.name for each in dataclasses.fields(AMoPOConfig) if each.init}
    listed = [set(ACTS), set(ELSEWHERE), set(arguments.REFUSED) & fields]
    assert set.union(*listed) == fields
    assert sum(map(len, listed)) == len(fields), "an option is listed twice"


# Parts of `observe` that are there before a run trains.
SET_UP = ("output", "checkpointing_options", "verbosity", "callbacks", "evaluation_rows",
          "loader", "layers", "layout", "streamed")  # fmt: skip


def observe(folder, monkeypatch, trains=True, **options):
    """What a tiny run did, by the name of a part."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, dtype="float32")
    )  # fmt: skip
    if options.get("weight_precision") == "bf16_stochastic":
        model = model.to(torch.bfloat16)
    args = configured(folder, **options)
    layers = [type(layer) for layer in model.model.layers]
    kernels, deterministic = runs(), []
    monkeypatch.setattr(
        "transformers.trainer.enable_full_determinism", lambda seed: deterministic.append(torch.manual_seed(seed))
    )
    known = transformers_logging.get_verbosity()
    data = list(pairs(14))
    trainer = console_trainer(model, args, dimensions=["first", "second"], train_dataset=data, eval_dataset=data[:4])
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(known)
    evaluation_rows = list(trainer.get_eval_dataloader().batch_sampler)
    loader = trainer.get_train_dataloader()
    rows, collate = [], trainer.data_collator

    def record(items):
        batch = collate(items)
        rows.append((batch["plan"].records.tolist(), float(batch["num_pairs"])))
        return batch

    trainer.data_collator = record
    metrics = trainer.train().metrics if trains else {}
    log = trainer.state.log_history
    saved = sorted(path.name for path in folder.glob("checkpoint-*"))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    inner = {k: str(v) for k, v in vars(optimizer).items() if isinstance(v, (str, bool))} if optimizer else {}
    inner |= {"on the host": str(getattr(optimizer, "_host", None) is not None)}
    return {
        "output": str(trainer.args.output_dir),
        "rows": rows,
        "steps": trainer.state.global_step,
        "losses": [line["loss"] for line in log if "loss" in line],
        "rates": [line["learning_rate"] for line in log if "learning_rate" in line],
        "optimizer": (type(optimizer).__name__, str(getattr(optimizer, "defaults", "")), inner),
        "weights": [float(p.detach().double().abs().sum()) for p in model.parameters()],
        "dtype": (str(next(model.parameters()).dtype), type(optimizer).__name__),
        "checkpointing": model.is_gradient_checkpointing,
        "checkpointing_options": str(trainer.args.gradient_checkpointing_kwargs),
        "kept": [layer.gradient_checkpointing for layer in model.model.layers],
        "logged": [line["step"] for line in log if "loss" in line],
        "verbosity": verbosity,
        "layout": choice_of(model).layout,
        "callbacks": [type(each).__name__ for each in trainer.callback_handler.callbacks],
        "evaluations": [line["step"] for line in log if "eval_loss" in line],
        "evaluation_rows": evaluation_rows,
        "best": (trainer.state.best_model_checkpoint, saved),
        "saved": saved,
        "files": sorted(path.name for path in folder.glob(f"{saved[-1]}/*")) if saved else [],
        "deterministic": len(deterministic),
        "metrics": sorted(metrics),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "loader": (loader.num_workers, loader.persistent_workers, loader.prefetch_factor,
                   str(loader.multiprocessing_context)),
        "backends": {key: count for key, count in runs().items() if count != kernels.get(key)}.keys(),
        "streamed": trainer.streamed is not None,
        "layers": [type(layer) is before for layer, before in zip(model.model.layers, layers, strict=True)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A part of `observe`, which runs once for each set of options."""
    known = {}

    def run(options, part):
        key = repr((sorted(options.items()), part not in SET_UP))
        if key not in known:
            with pytest.MonkeyPatch.context() as patch:
                folder = tmp_path_factory.mktemp("options")
                known[key] = observe(folder, patch, trains=part not in SET_UP, **options)
        return known[key][part]

    return run


@pytest.mark.parametrize("option", ACTS)
def test_an_option_changes_what_its_name_says(option, observed, tmp_path):
    value, part, beside = ACTS[option]
    if part is None:
        assert getattr(configured(tmp_path, **{option: value}), option) == value
        return
    if option == "output_dir":
        value = str(tmp_path / value)
    assert observed(beside, part) != observed({**beside, option: value}, part)


OTHER = {  # a value away from the default of every option that is refused
    bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.5,
    str: lambda value: f"{value}_", list: lambda value: ["loss"],
}  # fmt: skip
OF_NONE = {"neftune_noise_alpha": 0.5, "data_seed": 3}  # and text for the others


@pytest.mark.parametrize("option", [name for name in arguments.REFUSED if name in AMoPOConfig.__dataclass_fields__])
def test_an_option_that_nothing_reads_is_refused(option, tmp_path):
    field = AMoPOConfig.__dataclass_fields__[option]
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    with pytest.raises(OptionError, match=f"{option}=.* is refused: .") as caught:
        value = OF_NONE.get(option, "x") if default is None else OTHER[type(default)](default)
        configured(tmp_path, **{option: value})
    assert caught.value.option == option
    configured(tmp_path, **{option: default})


NEEDED = {  # (option, value, other options) without which it has no effect
    "do_eval": True, "eval_steps": 5, "eval_delay": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True,
    "greater_is_better": True, "save_steps": 7, "logging_steps": 7, "run_name": "a", "trackio_space_id": "a",
    "trackio_bucket_id": "a", "trackio_static_space_id": "a", "project": "a", "hub_token": "a",
    "hub_private_repo": True, "hub_model_id": "a/b", "hub_always_push": True, "hub_revision": "a",
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "keep_layers": 1,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "liger_kernel_config": {"rope": False},
    "tau": 2.0, "clip_in_backward": "per_tensor", "optimizer_states": "host", "weights": "host",
    "optim_target_modules": ["q_proj"], "fsdp_config": {"min_num_params": 1},
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork",
}  # fmt: skip


def test_the_table_holds_every_option_that_needs_another():
    assert {each.option for each in arguments.NEEDS} & set(AMoPOConfig.__dataclass_fields__) <= set(NEEDED)


@pytest.mark.parametrize("option", [name for name in NEEDED if name in AMoPOConfig.__dataclass_fields__])
def test_an_option_whose_condition_is_not_met_is_refused(option, tmp_path):
    off = {"save_steps": {"save_strategy": "no"}, "logging_steps": {"logging_strategy": "no"}}.get(option, {})
    with pytest.raises(OptionError) as caught:
        configured(tmp_path, **{option: NEEDED[option], **off})
    assert option in str(caught.value)


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"optim": "adafactor", "optim_in_backward": "adamw"}, "optim"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "warmup_steps"),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"a": 2}}, "lr_scheduler_kwargs"),
        ({"optim_args": "a=1", "optim_in_backward": "adamw"}, "optim_args"),
        ({"adam_beta1": 0.5, "optim": "adafactor"}, "adam_beta1"),
        ({"optim": "adamw_torch", "optim_args": "scale_parameter=True"}, "optim_args"),
        ({"optim": "adamw_torch_8bit", "optim_args": "a=1"}, "optim_args"),
        ({"gamma": 1.0, "objective": "dpo"}, "gamma"),
        ({"cpo_alpha": 1.0}, "cpo_alpha"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "liger_kernel_config"),
    ],
)
def test_an_option_beside_one_that_overrides_it_is_refused(options, blamed, tmp_path):
    with pytest.raises(OptionError) as caught:
        configured(tmp_path, **options)
    assert blamed in str(caught.value)


def test_no_warm_up_goes_with_a_schedule_that_has_none(tmp_path):
    configured(tmp_path, warmup_steps=0, lr_scheduler_type="constant")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_backend": "cuda"}, "choose one of auto, torch"),
        ({"kernel_backend": "fused"}, "kernel_backend: backend 'fused' cannot run here"),
        ({"attention_backend": "flash"}, "choose one of auto"),
        ({"attention_backend": "varlen"}, "'varlen' cannot be used"),
        ({"optim": "adam"}, "adam is not a valid"),
        ({"optim": "lomo"}, "optim: .*lomo"),
        ({"optim": "adafactor", "optim_args": "speed=1"}, None),
        ({"optim": "adafactor", "optim_args": "speed"}, "optim_args: 'speed' is no option; write NAME=VALUE"),
        ({"report_to": ["wanb"]}, "did you mean 'wandb'"),
        ({"report_to": ["comet_ml"]}, "not installed here.*pip install comet_ml"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: .*min_lr"),
        ({"lr_scheduler_kwargs": {"speed": 1}}, "lr_scheduler_kwargs: .*speed"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5.0}}, "lr_scheduler_kwargs: "),
        ({"push_to_hub": True, "hub_model_id": "a/b/c", "hub_token": "x"}, "hub_model_id: .*a/b/c"),
        ({"push_to_hub": True}, "push_to_hub needs a token"),
        ({"logits_cache_gib": 1.0, "kernel_backend": "torch"}, "logits_cache_gib=1.0 is not for kernel_backend torch"),
        ({"tf32": True}, "tf32"),
        *(({name: 1 if "steps" in name else True}, f"{name}=.* acts on a GPU alone") for name in arguments.ON_GPUS),
    ],
)
def test_names_are_tried_before_anything_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OptionError, match=message):
        configured(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "sets", "known"),
    [
        ("loss", [""], True), ("eval_loss", [""], True), ("accuracy/mean", [""], True), ("margin/first", [""], True),
        ("accuracy/third", [""], False), ("accuracy", [""], False), ("weight/mean", [""], False),
        ("loss", ["a", "b"], False), ("a_loss", ["a", "b"], True), ("eval_b_margin/mean", ["a", "b"], True),
        ("eval_c_loss", ["a", "b"], False),
    ],
)  # fmt: skip
def test_the_best_metric_is_one_of_the_evaluation(name, sets, known, tmp_path):
    args = configured(tmp_path, metric_for_best_model=name, **EVALUATES)
    if known:
        return arguments.check_best_metric(args, ["first", "second"], sets)
    with pytest.raises(OptionError, match=f"metric_for_best_model='{name}' is no metric"):
        arguments.check_best_metric(args, ["first", "second"], sets)


def test_the_learning_rate_depends_on_the_adapter(tmp_path, caplog):
    full, adapter = (configured(tmp_path, learning_rate=None) for _ in range(2))
    assert full.settle_learning_rate(adapter=False) == "learning_rate: 3e-07, the default for all weights"
    assert adapter.settle_learning_rate(adapter=True) == "learning_rate: 2e-05, the default of an adapter"
    assert (full.learning_rate, adapter.learning_rate) == (3e-7, 2e-5)
    assert not configured(tmp_path, learning_rate=3e-7).settle_learning_rate(adapter=True)
    assert "1e-5 to 1e-4 are usual" in caplog.text


def test_several_gpus_are_never_wrapped_in_dataparallel(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(AMoPOConfig, "n_gpu", property(lambda self: vars(self).get("_n_gpu") or 4))
    args = configured(tmp_path)
    assert args.n_gpu == 1 and "4 GPUs are visible and this process trains on the first" in caplog.text
    assert "accelerate launch" in caplog.text

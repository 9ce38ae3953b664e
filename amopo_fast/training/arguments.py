"""Which of TrainingArguments' options act on a planned run of packed rows; the others are refused.

An option that nothing reads, or that would make a run wrong, ends with its reason and what to use in its place. Names
of optimizers, schedules, trackers, backends and metrics are tried here, before a model or data is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames

from amopo_fast.data.sources.spec import did_you_mean
from amopo_fast.errors import Needs, OptionError
from amopo_fast.models.attention_backends import AttentionNeeds
from amopo_fast.models.attention_backends import choose_backend as choose_attention
from amopo_fast.optim.choose import LOW_BIT, in_backward_refusal
from amopo_fast.training.host_memory import refuse_in_host_memory
from amopo_fast.training.objective import SHARES
from amopo_fast.training.objectives import OBJECTIVES
from amopo_kernels.dispatch import choose_backend

_COMPILES = "compiles the whole model, for every row anew; use compile_layers"
_PLANNED = "which pairs form a step and a row is planned; "
_ONE_TABLE = "an evaluation gathers one table of numbers for each pair; eval_accumulation_steps bounds its memory"
# Refused away from its default: why, and what to use.
REFUSED = {
    "label_smoothing_factor": "smooths a cross-entropy that is not computed; label_smoothing is that of simpo and cpo",
    "average_tokens_across_devices": "a loss is divided by the step's pairs over all ranks, whatever this says",
    "bf16_full_eval": "evaluation computes as training does; use bf16, or `amopo-fast eval --dtype bfloat16`",
    "fp16_full_eval": "evaluation computes as training does; use fp16, or `amopo-fast eval --dtype float16`",
    "torch_compile": _COMPILES,
    "torch_compile_backend": _COMPILES,
    "torch_compile_mode": _COMPILES,
    "use_cache": "a packed row has no cache of keys; a saved model's config.json decides what generation does",
    "neftune_noise_alpha": "its noise is scaled by the length of a row, which here holds many sequences; leave it out",
    "auto_find_batch_size": _PLANNED + "lower tokens_per_micro_batch, or see `amopo-fast estimate`",
    "logging_nan_inf_filter": "a loss that is not finite ends the run before the weights change; leave it out",
    "include_num_input_tokens_seen": "metrics.jsonl has tokens_per_second/computed, /label and /padded_equivalent",
    "prediction_loss_only": "an evaluation is its metrics; leave eval_data out where there shall be none",
    "eval_do_concat_batches": _ONE_TABLE,
    "eval_use_gather_object": _ONE_TABLE,
    "batch_eval_metrics": _ONE_TABLE,
    "include_for_metrics": "metrics are made from that table alone; compute others from the saved model",
    "save_on_each_node": "all nodes share one output_dir, and rank 0 writes to it; leave it out",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case; leave it out",
    "hub_strategy": "uploads of checkpoints hold Trainer's pickled arguments, tokens included; use end",
    "ignore_data_skip": "a resumed run goes on where its plan was left; leave it out",
    "data_seed": "seed decides the order of the data too; use seed",
    "accelerator_config": _PLANNED + "accelerate's data loaders are not used",
    "parallelism_config": "tensor and context parallelism are not supported; shard the model with FSDP2",
    "dataloader_drop_last": "an epoch's last step may hold fewer pairs and is divided by their number; leave it out",
    "dataloader_in_order": "a run is the same only if its rows come in the order of the plan; leave it out",
    "remove_unused_columns": "batches are plans, not columns; leave it out",
    "label_names": "batches are plans, not columns; leave it out",
    "train_sampling_strategy": _PLANNED + "the order follows seed, and rows of like length are packed in any case",
    "length_column_name": "lengths are those of the tokens; leave it out",
    "do_predict": "`amopo-fast eval` and `amopo-fast generate` do it",
    "local_rank": "launchers say it by LOCAL_RANK: use torchrun or accelerate launch",
}
_EVALUATES = ("steps", "epoch")
_LOW_RANK = tuple(str(each.value) for each in OptimizerNames if "galore" in each.value or "apollo" in each.value)
NEEDS = (
    Needs("do_eval", "eval_strategy", _EVALUATES),
    Needs("eval_steps", "eval_strategy", ("steps",)),
    Needs("eval_delay", "eval_strategy", _EVALUATES),
    Needs("metric_for_best_model", "eval_strategy", _EVALUATES),
    Needs("load_best_model_at_end", "eval_strategy", _EVALUATES),
    Needs("greater_is_better", "metric_for_best_model"),
    Needs("save_steps", "save_strategy", ("steps",)),
    Needs("logging_steps", "logging_strategy", ("steps",)),
    Needs("run_name", "report_to"),
    *(Needs(f"trackio_{name}", "report_to", ("trackio",)) for name in ("space_id", "bucket_id", "static_space_id")),
    Needs("project", "report_to", ("trackio",)),
    *(Needs(f"hub_{name}", "push_to_hub") for name in ("token", "private_repo", "model_id", "always_push", "revision")),
    Needs("gradient_checkpointing_kwargs", "gradient_checkpointing"),
    Needs("activation_checkpointing_kwargs", "activation_checkpointing"),
    Needs("keep_layers", "gradient_checkpointing"),
    Needs("liger_kernel_config", "use_liger_kernel"),
    Needs("clip_in_backward", "optim_in_backward"),
    Needs("optimizer_states", "optim_in_backward"),
    Needs("weights", "optim_in_backward"),
    Needs("tau", "weighting", ("worst_first",)),
    Needs("optim_target_modules", "optim", _LOW_RANK),
    Needs("fsdp_config", "fsdp"),
    *(Needs(f"dataloader_{name}", "dataloader_num_workers")
      for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context")),
)  # fmt: skip
ON_GPUS = ("fp16", "torch_empty_cache_steps", "eval_accumulation_steps", "use_liger_kernel")
# (option, another one, its values or none for any): the first has no effect beside the second.
BESIDE = (
    ("optim", "optim_in_backward", ()),
    ("optim_args", "optim_in_backward", ()),
    ("gradient_accumulation_steps", "pairs_per_step", ()),
    ("per_device_train_batch_size", "pairs_per_step", ()),
    ("deepspeed", "fsdp", ()),
    ("warmup_steps", "lr_scheduler_type", ("constant", "reduce_lr_on_plateau", "greedy")),
    ("lr_scheduler_kwargs", "lr_scheduler_type", ("constant", "constant_with_warmup")),
)


def refuse_without_effect(args: Any, changed: dict[str, Any]) -> None:
    """Before TrainingArguments fills in what follows from other options.

    changed: the options that are not at their default (`errors.changed_fields`).

    Raises:
        OptionError: names the option, why it is refused and what to use.
    """
    for name, value in changed.items():
        means_no = name == "include_num_input_tokens_seen" and value is False  # YAML reads no as false
        if name in REFUSED and not means_no:
            raise OptionError(f"{name}={value!r} is refused: {REFUSED[name]}", name)
    for name, other, values in BESIDE:
        if changed.get(name) and other in changed and (not values or changed[other] in values):
            raise OptionError(
                f"{name}={changed[name]!r} has no effect beside {other}={changed[other]!r}: leave one of them out", name
            )


def refuse_unread(args: Any, changed: dict[str, Any]) -> None:
    """When TrainingArguments has filled in what follows from other options. Arguments and errors as above."""
    for need in NEEDS:
        need.refuse(args, changed)


def try_names(args: Any, changed: dict[str, Any]) -> None:
    """Try what the options name: backends on this device, the optimizer, the schedule, trackers, the Hub's names.

    Raises:
        OptionError: it does not exist, is not installed, or does not take what it is given.
    """
    device = args.device
    for name in ON_GPUS:
        if changed.get(name) and device.type == "cpu":
            raise OptionError(f"{name}={changed[name]!r} acts on a GPU alone, this run is on a CPU: leave it out", name)
    _try("kernel_backend", lambda: choose_backend(args.kernel_backend, torch.empty(0, 1, device=device), torch.float32))
    is_torch = args.kernel_backend == "torch" or (args.kernel_backend == "auto" and device.type == "cpu")
    if args.logits_cache_bytes and is_torch:
        raise OptionError(f"logits_cache_gib={args.logits_cache_gib} is not for kernel_backend torch, which runs on "
                          f"{device.type}; leave it out", "logits_cache_gib")  # fmt: skip
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needs = AttentionNeeds(device.type, capability, torch.bfloat16, head_dim=8)
    _try("attention_backend", lambda: choose_attention(args.attention_backend, needs))
    refuse_in_host_memory(args)
    if args.optim_in_backward and (reason := in_backward_refusal(args)):
        raise OptionError(f"optim_in_backward={args.optim_in_backward}: {reason}", "optim_in_backward")
    _try_optimizer(args, changed)
    _try_schedule(args)
    _try_trackers(args.report_to)
    if args.push_to_hub:
        _try_hub(args)


def _try(name: str, function) -> None:
    try:
        function()
    except Exception as error:  # of a library
        text = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(text if text.startswith(name) else f"{name}: {text}", name) from error


def _try_optimizer(args: Any, changed: dict[str, Any]) -> None:
    """The optimizer of `optim` can be had, and every one of its options changes it."""
    name = str(getattr(args.optim, "value", args.optim))
    if args.optim_in_backward:
        return
    if name in LOW_BIT and not args.fsdp and not args.deepspeed:  # AdamW of this package, which needs no library
        if args.optim_args:
            raise OptionError(f"optim_args={args.optim_args!r} has no effect with optim {name}", "optim_args")
        return
    if bad := [item for item in filter(None, (args.optim_args or "").split(",")) if "=" not in item]:
        raise OptionError(f"optim_args: {bad[0]!r} is no option; write NAME=VALUE,...", "optim_args")
    probe = nn.Sequential(nn.Linear(2, 2))

    def built(**changes) -> tuple[type, dict]:
        trial = copy.copy(args)
        for key, value in {**changes, "optim_target_modules": args.optim_target_modules and "all-linear"}.items():
            setattr(trial, key, value)
        return Trainer.get_optimizer_cls_and_kwargs(trial, probe)

    _try("optim_args" if args.optim_args else "optim", built)
    defaults = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    for option in defaults.keys() & changed.keys():
        if built() == built(**{option: defaults[option]}):
            raise OptionError(f"{option}={changed[option]} has no effect with optim {name}; leave it out", option)
    for item in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        rest = [each for each in args.optim_args.replace(" ", "").split(",") if each and each != item]
        if built() == built(optim_args=",".join(rest)):
            raise OptionError(f"optim_args: {item} has no effect with optim {name}; leave it out", "optim_args")


def _try_schedule(args: Any) -> None:
    def build() -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        kwargs = args.lr_scheduler_kwargs
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10**6, kwargs and dict(kwargs))
        for _ in range(3):  # past the warm-up
            optimizer.step()
            schedule.step(*([1.0] if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") else []))

    _try("lr_scheduler_kwargs", build)


def _try_trackers(names: Sequence[str]) -> None:
    available = (*get_available_reporting_integrations(), "flyte")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(f"report_to={name!r} is not supported{did_you_mean(name, INTEGRATION_TO_CALLBACK)}",
                              "report_to")  # fmt: skip
        if name not in available:
            raise OptionError(f"report_to={name!r} is not installed here, or switched off by its environment variable: "
                              f"pip install {name}, or leave it out", "report_to")  # fmt: skip


def _try_hub(args: Any) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    if args.hub_model_id is not None:
        _try("hub_model_id", lambda: validate_repo_id(args.hub_model_id))
    if not (args.hub_token or get_token()):
        raise OptionError("push_to_hub needs a token of the Hub: `hf auth login`, or set HF_TOKEN", "push_to_hub")


def check_best_metric(args: Any, dimensions: Sequence[str], sets: Iterable[str]) -> None:
    """The metric that chooses the best checkpoint is one that an evaluation gives.

    sets: names of the evaluation sets, "" for a single one without a name.

    Raises:
        OptionError: it is none; names those that are alike.
    """
    name = args.metric_for_best_model
    prefixes = [f"eval_{each}_" if each else "eval_" for each in sets]
    if name is None or not prefixes:
        return
    columns = OBJECTIVES[args.objective].columns
    metrics = ["loss", "preference_loss", "runtime", "samples_per_second", "steps_per_second"]
    metrics += [f"{column}/{dimension}" for column in columns for dimension in dimensions]
    metrics += [f"{column}/mean" for column in columns if column not in SHARES]
    known = [prefix + metric for prefix in prefixes for metric in metrics]
    asked = name if name.startswith("eval_") else f"eval_{name}"
    if asked not in known:
        hint = did_you_mean(asked, known) or f"; among them: {', '.join(known[:2] + known[-2:])}"
        several = f" ({len(prefixes)} sets: name one of them)" if len(prefixes) > 1 else ""
        raise OptionError(f"metric_for_best_model={name!r} is no metric of the evaluation{several}{hint}",
                          "metric_for_best_model")  # fmt: skip

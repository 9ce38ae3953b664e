"""Which optimizer a run uses: transformers' own by `--optim`, or AdamW of this package, and which ones are refused."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from amopo_fast.optim.adamw import AdamW
from amopo_fast.optim.host_states import blocks_of

if TYPE_CHECKING:  # its import takes seconds, which kernels compiled in processes of their own need not wait for
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

IN_BACKWARD = {"adamw": "fp32", "adamw_8bit": "8bit", "adamw_4bit": "4bit"}
LOW_BIT = {"adamw_torch_8bit": "8bit", "adamw_torch_4bit": "4bit"}
STATES_OF_OPTIM = {"adamw_torch": "fp32", "adamw_torch_fused": "fp32", **LOW_BIT}

PLAIN_BF16_WARNING = (
    "weight_precision=bf16: weights are rounded to the nearest bfloat16 after every update. At learning rates below "
    "about 1e-5 most updates are smaller than half a bfloat16 step and are lost (at 3e-7, three AdamW steps change "
    "0.5 % of the weights, 2.7 % with stochastic rounding); use --weight_precision bf16_stochastic"
)


def choose_optimizer(args: TrainingArguments, model: nn.Module, micro_batches: int) -> tuple[type, dict] | None:
    """(class, keyword arguments) for Trainer's `optimizer_cls_and_kwargs`, or None: Trainer's own by `--optim`.

    Args:
        args: an AMoPOConfig.
        model: with its trainable parameters marked.
        micro_batches: of an optimizer step.

    Raises:
        ValueError: `optim_in_backward` where it cannot work, or an optimizer that cannot train bfloat16 weights.
    """
    sharded = is_sharded(args)
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
               "seed": args.seed}  # fmt: skip
    rounds = args.weight_precision != "bf16"
    trains_bf16 = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    has_bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    if trains_bf16 and args.weight_precision == "fp32" or args.weight_precision.startswith("bf16") and not has_bf16:
        found = "bfloat16" if has_bf16 else "float32"
        raise ValueError(
            f"weight_precision={args.weight_precision}, but the model given has {found} weights: load it in the other "
            "dtype, or give its name and not the model"
        )
    if trains_bf16 and not rounds:
        logger.warning(PLAIN_BF16_WARNING)

    if args.optim_in_backward:
        if reason := in_backward_refusal(args, micro_batches):
            raise ValueError(f"optim_in_backward={args.optim_in_backward}: {reason}")
        _say_how_it_clips(args)
        return AdamW, {
            **options,
            "states": IN_BACKWARD[args.optim_in_backward],
            "stochastic_rounding": rounds,
            "in_backward": True,
            "max_grad_norm": args.max_grad_norm,
            "clipping": args.clip_in_backward,
            "host_blocks": blocks_of(model) if args.optimizer_states == "host" else (),
            "device": args.device if args.weights == "host" else None,
        }
    name = str(getattr(args.optim, "value", args.optim))
    if sharded and name in LOW_BIT:
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"--optim {name} under FSDP or DeepSpeed is torchao's, which is not installed: pip install torchao"
            )
        if trains_bf16 and rounds:
            args.optim_args = ",".join(filter(None, [args.optim_args, "bf16_stochastic_round=True"]))
        return None
    if name not in LOW_BIT and not (trains_bf16 and rounds):
        return None
    if sharded or name not in STATES_OF_OPTIM:
        engine = " under FSDP or DeepSpeed" if sharded else ""
        raise ValueError(
            f"--optim {name}{engine} does not round stochastically, so bfloat16 weights would lose small updates: use "
            f"--optim adamw_torch_8bit or adamw_torch_4bit{'' if sharded else ' or adamw_torch_fused'}, or load the "
            "model in float32 (--weight_precision fp32), or accept it with --weight_precision bf16"
        )
    return AdamW, {**options, "states": STATES_OF_OPTIM[name], "stochastic_rounding": rounds}


def is_sharded(args) -> bool:
    """Whether FSDP or DeepSpeed places the model."""
    return bool(args.fsdp) or args.deepspeed is not None


def in_backward_refusal(args, micro_batches: int = 1) -> str | None:
    """Why a run's optimizer cannot step in the backward pass, and what to do; None where it can."""
    if micro_batches > 1:
        return (
            f"a step of pairs_per_step={args.pairs_per_step} pairs is split into {micro_batches} micro-batches, whose "
            "gradients would have to be accumulated; raise tokens_per_micro_batch or lower pairs_per_step"
        )
    if is_sharded(args):
        return "FSDP and DeepSpeed reduce and shard gradients on their own; use --optim adamw_torch_8bit there"
    if args.world_size > 1:
        return (
            "on several ranks each would step with its own gradient before they are averaged, and the weights would "
            "diverge; shard the model with FSDP instead"
        )
    return "float16 needs a loss scaler, which judges all gradients before the step; use bf16" if args.fp16 else None


def _say_how_it_clips(args) -> None:
    if args.max_grad_norm > 0:
        how = {
            "previous_norm": "by the previous step's global norm (the first step: each tensor by its own)",
            "per_tensor": "each tensor by its own norm",
        }[args.clip_in_backward]
        logger.warning(
            "optimizer step in the backward pass: gradients are clipped to %g %s; the logged grad_norm is this step's "
            "global norm before clipping", args.max_grad_norm, how,
        )  # fmt: skip


def backward_grad_norm(optimizer) -> torch.Tensor | None:
    """() float32: this step's global norm before clipping, if `optimizer` stepped in the backward pass; else None."""
    inner = _in_backward(optimizer)
    return None if inner is None else inner.grad_norm()


def applied_in_backward(optimizer) -> dict[torch.Tensor, bool] | None:
    """`AdamW.applied`, if `optimizer` stepped in the backward pass; else None."""
    inner = _in_backward(optimizer)
    return None if inner is None else inner.applied()


def _in_backward(optimizer) -> AdamW | None:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return inner if isinstance(inner, AdamW) and inner.in_backward else None

"""TRL's trainers on this head: `patch_trl(trainer)`, written against TRL 1.16.

DPO, GRPO, RLOO, KTO and SFT score tokens by a chunked head of TRL's own (`add_fused_lm_head`), whose log-probabilities
come in the model's dtype; CPO takes a log-softmax of all logits. Here both are linear_logps. Metrics stay as they are:
the mean logit, whether the label is the most likely token, and WPO's log of the sum of squared probabilities come from
the same pass. LoRA on the head: TRL refuses it itself, but for CPO, where it is computed.
"""

from __future__ import annotations

import functools
import types
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..head import linear_logps
from .hf import causal_lm, model_logps

# TRL's names of what a pass returns, in its order, and ours.
_OUTPUTS = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logit", "is_top1": "top1",
}  # fmt: skip


class _PerToken(NamedTuple):
    """What TRL's chunked head returns: (N,) each, None where not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def patch_trl(trainer, *, backend: str = "auto") -> None:
    """Let a TRL trainer compute log-probabilities, entropies and its metrics by linear_logps, its reference model too.

    Args:
        trainer: DPO, GRPO, RLOO, KTO, SFT or CPO, made and not yet trained. backend: of `linear_logps`.

    Raises:
        UnsupportedError: another trainer, or another TRL's.
    """
    if hasattr(trainer, "concatenated_forward") and hasattr(trainer, "cpo_loss"):
        trainer.concatenated_forward = types.MethodType(functools.partial(_cpo_forward, backend=backend), trainer)
        return
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    for model in models:
        _patch_fused_head(causal_lm(model), trainer, backend)


def _patch_fused_head(model: nn.Module, trainer, backend: str) -> None:
    """Give TRL's forward another head and nothing else: a copy of the function in which one name means ours."""
    prepared = vars(model).get("_original_forward")  # under accelerate's mixed precision
    forward = getattr(prepared or model.forward, "__func__", None)
    if "_ChunkedLogProbFunction" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        raise UnsupportedError(
            f"{type(trainer).__name__}: the forward of its {type(model).__name__} is not that of TRL's "
            "add_fused_lm_head, which DPO, GRPO, RLOO, KTO and SFT of TRL 1.16 put there; with another TRL, call "
            "amopo_kernels.integrations.hf.model_logps where the trainer computes log-probabilities"
        )
    names = {
        "_ChunkedLogProbFunction": types.SimpleNamespace(apply=functools.partial(_per_token, backend)),
        "_use_triton": lambda device: True,  # only scored tokens reach the head
    }
    copy = types.FunctionType(
        forward.__code__, forward.__globals__ | names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copy, forward)
    model.forward = types.MethodType(copy, model)
    if prepared is not None:
        accelerator = trainer.accelerator
        accelerator._models = [other for other in accelerator._models if other is not model]
        model._is_accelerate_prepared = False
        accelerator.prepare_model(model, evaluation_mode=True)


def _per_token(
    backend: str, hidden, weight, bias, labels, temperature, chunk, softcap, logit_scale, wanted
) -> _PerToken:
    """In the place of TRL's `_ChunkedLogProbFunction.apply`: hidden (N, H), labels (N,) of scored tokens."""
    names = [name for name in _OUTPUTS if name in wanted]
    found = linear_logps(
        hidden, weight, labels, bias, softcap=None if softcap is None else softcap / logit_scale,
        temperature=temperature / logit_scale, outputs=[_OUTPUTS[name] for name in names], backend=backend,
    )  # fmt: skip
    found = dict(zip(["log_probs", *names], found if names else [found], strict=True))
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"] == labels
    if "mean_logits" in found:
        found["mean_logits"] = found["mean_logits"].detach()
    return _PerToken(**{name: found.get(name) for name in _PerToken._fields})


def _cpo_forward(trainer, model: nn.Module, batch: dict, *, backend: str) -> tuple:
    """CPOTrainer.concatenated_forward, whose logits are needed for log-probabilities and their mean alone."""
    if trainer.is_encoder_decoder or trainer.aux_loss_enabled:
        raise UnsupportedError("CPO of encoder-decoder models or with a router loss is not served; do not patch it")
    both = trainer.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=trainer.pad_token_id, device=trainer.accelerator.device
    )
    input_ids, labels = both["concatenated_input_ids"], both["concatenated_labels"]
    chosen = len(batch["chosen_labels"])
    scored = labels != -100
    # The metric is a mean over all positions, prompts and padding too, which all of them are computed for.
    logps, mean_logit = model_logps(
        model, nn.functional.pad(input_ids, (0, 1)), labels=nn.functional.pad(labels.masked_fill(~scored, 0), (0, 1)),
        attention_mask=nn.functional.pad(both["concatenated_attention_mask"], (0, 1)), outputs=("mean_logit",),
        backend=backend,
    )  # fmt: skip
    logps = logps[:, :-1] * scored[:, 1:]
    nll = torch.zeros((), device=logps.device)
    if trainer.cpo_alpha != 0:
        nll = -logps[:chosen].sum() / scored[:chosen, 1:].sum()
    total = logps.sum(-1)
    if trainer.loss_type in ("ipo", "simpo"):
        total = total / scored[:, 1:].sum(-1)
    mean_logit = mean_logit.detach()
    return total[:chosen], total[chosen:], mean_logit[:chosen], mean_logit[chosen:], nll

"""At the start of a run: the logits of a real model's own forward against those that its training computes.

The trial in miniature speaks for a class. What a class reads from sizes (tokens of a padded vocabulary, a multiplier
that depends on a width) or what was done to one model's head shows in that model alone: so a few tokens go through its
own forward, and their last hidden states through the head as the kernels have it. It costs one short forward pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from amopo_fast.models.architecture import UnsupportedModelError, decoder_of, language_model_of
from amopo_fast.models.choice import choice_of
from amopo_fast.models.head import SPREAD, HeadForm, call_as_forward, head_forms, head_of, own_logits, text_only
from amopo_fast.prompts.tokens import PairTokens

TOKENS = 16  # of a sequence, that are looked at
_ROUNDINGS = 8  # of the logits' dtype, that two ways through one head may differ by, on average


def check_real_logits(model: nn.Module, pair: PairTokens, wrapped: nn.Module | None = None) -> float:
    """Compare the logits of a few tokens: the model's own forward, and its head as `scoring.score` uses it.

    Args:
        model: a causal LM (or a PEFT model around one) after `prepare_model`, with its real weights.
        pair: of which the first TOKENS tokens are looked at.
        wrapped: the model inside DDP, FSDP or DeepSpeed, which gather its weights around their forward pass; every
            rank has to call.

    Returns:
        The mean difference relative to the logits' mean magnitude; 0.0 where the head is the model's own forward.

    Raises:
        UnsupportedModelError: names what differs.
    """
    form = choice_of(model).head
    if form is None:
        return 0.0
    device = next(model.parameters()).device
    prompt = next(each for each in pair.prompts if each is not None)
    tokens = torch.from_numpy(np.concatenate([prompt, pair.chosen])[:TOKENS]).to(device)[None]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # dropout must not move the run's
        return call_as_forward(wrapped or model, model, lambda: _compare(language_model_of(model), tokens, form))


def _compare(model: nn.Module, ids: torch.Tensor, form: HeadForm) -> float:
    seen: list[torch.Tensor] = []
    hook = decoder_of(model).register_forward_hook(lambda module, inputs, out: seen.append(out.last_hidden_state[0]))
    try:
        own = model.forward(input_ids=ids, use_cache=False, **text_only(model, ids)).logits[0]
    finally:
        hook.remove()
    # Logits of an untrained model are so small that no softcap shows, and those of bfloat16 hide one of 30.
    larger = seen[-1] * (SPREAD / own.double().std().clamp(min=1e-6)).to(seen[-1])
    forms = head_forms(model.config)
    return max(
        _require_equal(type(model).__name__, logits, *_products(model, rows), form, forms)
        for rows, logits in ((seen[-1], own), (larger, own_logits(model, larger)))
    )


def _products(model: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, V) hidden times lm_head, and its bias."""

    def products() -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = head_of(model)
        return nn.functional.linear(hidden.to(weight.dtype), weight), bias

    head = model.get_output_embeddings()
    return call_as_forward(head, head, products)  # sharded weights are gathered around its call


def _logits(raw: torch.Tensor, bias: torch.Tensor | None, form: HeadForm) -> torch.Tensor:
    return form.logits((raw if bias is None else raw + bias).double())


def _difference(own: torch.Tensor, other: torch.Tensor) -> float:
    own = own.double()
    return float((own - other).abs().mean() / own.abs().mean().clamp(min=1e-30))


def _require_equal(name, own, raw, bias, form: HeadForm, forms: list[HeadForm]) -> float:
    """Relative difference of the logits of a model's own forward and those of its products with lm_head, own and
    raw (N, V)."""
    refused = f"{name} cannot be trained: "
    if own.shape != raw.shape:
        raise UnsupportedModelError(
            f"{refused}its own forward predicts {own.shape[-1]} tokens, its lm_head has rows of {raw.shape[-1]}: "
            "compare vocab_size and unpadded_vocab_size of config.json with the weights"
        )
    rounding = _ROUNDINGS * torch.finfo(raw.dtype).eps
    error = _difference(own, _logits(raw, bias, form))
    if error < rounding or not math.isfinite(error):  # weights that are not finite are named by who guards them
        return error
    found = f"the logits of its own forward differ by {error:.1e} from those of {_words(form)}, which its miniature has"
    other = next((each for each in forms if _difference(own, _logits(raw, bias, each)) < rounding), None)
    plain = _logits(raw, bias, HeadForm())
    factor = float((own * plain).sum() / plain.pow(2).sum().clamp(min=1e-30))
    if other is not None:
        found += f"; its own are those of {_words(other)}"
    elif bias is not None and _difference(own, _logits(raw, None, form)) < rounding:
        found += "; its own leave lm_head's bias out"
    elif _difference(own, factor * plain) < rounding:
        found += f"; its own are {factor:.4g} times lm_head's"
    raise UnsupportedModelError(
        f"{refused}{found}. Compare logit scales and softcaps of config.json with those that the weights were "
        "published with"
    )


def _words(form: HeadForm) -> str:
    cap = "no softcap" if form.softcap is None else f"softcap {form.softcap:g}"
    return f"lm_head with {cap} and temperature {form.temperature:g}"

"""The scoring step: a model and a plan in, the statistics of every sequence out. Knows no trainer.

    plan -> model body -> hidden rows that predict a label -> lm_head inside the kernel -> SequenceStats

Only label rows reach the head and no logits are materialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import amopo_kernels
from amopo_fast.attention import is_switched, packed_attention, switch_attention
from amopo_fast.attention_backends import choose_backend
from amopo_fast.models import (
    BEYOND_LIMIT,
    attention_needs,
    check_packing,
    check_prompt_learning,
    decoder_of,
    position_limit,
)
from amopo_fast.plan import Plan
from amopo_fast.prompts import PairTokens
from amopo_kernels import SequenceStats


@dataclass(frozen=True)
class Head:
    """What turns the body's hidden states into logits: temperature and softcap as amopo_kernels takes them."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    softcap: float | None
    temperature: float


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """The output head of a causal LM.

    Raises:
        ValueError: the head is not a plain linear layer (LoRA on lm_head, quantised heads) or the model has none.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; AMoPO trains causal language models")
    # FSDP2 replaces a module's class by a subclass of FSDPModule and it.
    own_class = next(kind for kind in type(head).__mro__ if not issubclass(kind, FSDPModule))
    if own_class is not nn.Linear:
        raise ValueError(
            f"lm_head is a {type(head).__name__}, not nn.Linear: adapters and quantisation on lm_head are not "
            "supported; leave lm_head out of target_modules (and in llm_int8_skip_modules), or merge it first"
        )
    config = causal_lm(model).config.get_text_config()
    temperature = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        temperature *= config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        temperature /= config.logit_scale
    return Head(head.weight, head.bias, getattr(config, "final_logit_softcapping", None), temperature)


def prepare_model(model: nn.Module) -> nn.Module:
    """Check that a causal LM can be packed and switch it to packed attention, in place.

    Padded batches and generate() of the same object keep running as before.

    Raises:
        UnsupportedModelError: `models.check_packing`.
    """
    check_prompt_learning(model)
    check_packing(causal_lm(model))
    switch_attention(causal_lm(model))
    return model


def check_lengths(model: nn.Module, pairs: Iterable[PairTokens]) -> None:
    """Refuse pairs that are too long to be packed exactly (`models.position_limit`).

    Raises:
        ValueError: names the record.
    """
    limit = position_limit(causal_lm(model).config)
    if limit is None:
        return
    for pair in pairs:
        prompt = max((len(prompt) for prompt in pair.prompts if prompt is not None), default=0)
        length = prompt + max(len(pair.chosen), len(pair.rejected)) - 1  # the last token is only a label
        if length > limit:
            raise ValueError(f"record {pair.record}: {length} tokens are beyond {limit} positions, {BEYOND_LIMIT}")


def backend_for(model: nn.Module, device: torch.device, requested: str = "auto") -> str:
    """The backend that runs the model's packed rows on `device`, under the autocast that is on.

    Raises:
        ValueError: `choose_backend`.
    """
    return choose_backend(requested, attention_needs(causal_lm(model), device))


def hidden_states(model: nn.Module, plan: Plan, attention_backend: str = "auto") -> torch.Tensor:
    """(T, H) last hidden states of a packed row, after the final norm. Arguments and errors as `score`."""
    language_model = causal_lm(model)
    if not is_switched(language_model):
        raise ValueError(
            f"the attention implementation is {language_model.config._attn_implementation!r}, which takes no packed "
            "rows; call prepare_model(model) first"
        )
    limit = position_limit(language_model.config)
    if limit is not None and plan.max_seqlen_k > limit:
        raise ValueError(f"a sequence of {plan.max_seqlen_k} tokens is beyond {limit} positions, {BEYOND_LIMIT}")
    backend = backend_for(model, plan.input_ids.device, attention_backend)
    with packed_attention(plan, backend) as attention_inputs:
        output = decoder_of(language_model)(
            input_ids=plan.input_ids, position_ids=plan.position_ids, use_cache=False, **attention_inputs
        )
    return output.last_hidden_state[0]


def score(model: nn.Module, plan: Plan, *, attention_backend: str = "auto", **head_options) -> SequenceStats:
    """Score every sequence of a packed row.

    Args:
        model: a causal LM (or a PEFT model around one) after `prepare_model`. Distributed wrappers: `score_wrapped`.
        plan: on the model's device.
        attention_backend: a name of `attention_backends.BACKENDS`, or "auto".
        head_options: passed to `amopo_kernels.linear_sequence_stats` (backend, logits_cache_bytes, ...).

    Returns:
        SequenceStats with S = pairs * K * 2 entries; `logp_sum` is differentiable in the model's parameters.

    Raises:
        ValueError: the model was not prepared (or its attention implementation was changed since), a sequence is too
            long for its RoPE (`models.position_limit`), or the attention backend cannot be used.
    """
    head_of(model)  # an unsupported head is refused before the body runs
    hidden = hidden_states(model, plan, attention_backend)

    def statistics(rows: torch.Tensor) -> SequenceStats:
        head = head_of(model)
        return amopo_kernels.linear_sequence_stats(
            rows,
            head.weight,
            plan.labels,
            plan.cu_seqlens,
            head.bias,
            softcap=head.softcap,
            temperature=head.temperature,
            **head_options,
        )

    # As the head module's forward: FSDP2 and ZeRO-3 gather its weight in hooks around that call and nowhere else.
    head_module = causal_lm(model).get_output_embeddings()
    return _call_as_forward(head_module, head_module, statistics, hidden.index_select(0, plan.label_rows))


def score_wrapped(wrapped: nn.Module, model: nn.Module, plan: Plan, **head_options) -> SequenceStats:
    """`score` run as the forward of `wrapped`, so that DDP, FSDP and DeepSpeed see their forward pass.

    Their hooks gather sharded parameters (the head's among them) and prepare gradient reduction around
    `wrapped.forward`, which ends in `model.forward`; for one call, that is the scoring step.
    """
    return _call_as_forward(wrapped, model, lambda: score(model, plan, **head_options))


def _call_as_forward(wrapped: nn.Module, model: nn.Module, function: Callable, *arguments: torch.Tensor):
    """`wrapped(*arguments)` with `model.forward` being `function`, for this one call."""
    own_forward = vars(model).get("forward")

    def restore() -> None:
        if own_forward is None:
            vars(model).pop("forward", None)
        else:
            model.forward = own_forward

    def forward(*arguments):
        restore()
        return function(*arguments)

    model.forward = forward
    try:
        return wrapped(*arguments)
    finally:
        restore()

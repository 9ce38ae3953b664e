"""The scoring step: a model and a plan in, the statistics of every sequence out. Knows no trainer.

    plan -> model body -> hidden rows that predict a label -> lm_head inside the kernel -> SequenceStats

Only label rows reach the head and no logits are materialised.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import amopo_kernels
from amopo_fast.models.architecture import BEYOND_LIMIT, attention_needs, decoder_of, language_model_of, position_limit
from amopo_fast.models.attention import is_switched, packed_row
from amopo_fast.models.attention_backends import choose_backend
from amopo_fast.models.choice import choice_of
from amopo_fast.models.head import head_of, no_images, own_logps
from amopo_fast.models.routers import experts_per_token, router_loss
from amopo_fast.packing.plan import Layout, Plan
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels import SequenceStats
from amopo_kernels.integrations.hf import call_as_forward


def check_lengths(model: nn.Module, pairs: Iterable[PairTokens]) -> None:
    """Refuse pairs that are too long to be packed exactly (`architecture.position_limit`).

    Raises:
        ValueError: names the record.
    """
    base = language_model_of(model)
    limit = position_limit(base.config, choice_of(base).layout is not Layout.SEPARATE)
    if limit is None:
        return
    for pair in pairs:
        prompt = max((len(prompt) for prompt in pair.prompts if prompt is not None), default=0)
        length = prompt + max(len(pair.chosen), len(pair.rejected)) - 1  # the last token is only a label
        if length > limit:
            raise ValueError(f"record {pair.record}: {length} tokens are beyond {limit} positions, {BEYOND_LIMIT}")


def backend_for(model: nn.Module, device: torch.device, requested: str = "auto") -> str:
    """What runs the model's attention on `device`, under the autocast that is on: of packed rows a name of
    `attention_backends.BACKENDS`, of separate rows the model's own implementation.

    Raises:
        ValueError: `choose_backend`.
    """
    model = language_model_of(model)
    if choice_of(model).layout is Layout.SEPARATE:
        return str(model.config.get_text_config()._attn_implementation)
    return choose_backend(requested, attention_needs(model, device))


def hidden_states(
    model: nn.Module, plan: Plan, attention_backend: str = "auto", router_losses: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """(R * L, H) last hidden states of a plan's rows, after the final norm. Arguments and errors as `score`."""
    language_model = language_model_of(model)
    layout = choice_of(model).layout
    limit = position_limit(language_model.config, layout is not Layout.SEPARATE)
    if limit is not None and plan.longest > limit:
        raise ValueError(f"a sequence of {plan.longest} tokens is beyond {limit} positions, {BEYOND_LIMIT}")
    decoder = decoder_of(language_model)

    def body(inputs: dict[str, Any]) -> torch.Tensor:
        if router_losses is None:
            return decoder(input_ids=plan.input_ids, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        output = decoder(input_ids=plan.input_ids, use_cache=False, output_router_logits=True, **inputs)
        chosen = experts_per_token(language_model)
        router_losses.append(router_loss(output.router_logits, chosen, plan.token_uses))
        return output.last_hidden_state.flatten(0, 1)

    if plan.paths is None:  # causal attention never sees the padding on the right
        return body(no_images(decoder, plan.input_ids))
    if layout is Layout.SEPARATE or (layout is Layout.STATES and plan.paths.states is None):
        raise ValueError(f"{type(language_model).__name__} takes plans of the layout {layout.value} alone")
    if not is_switched(language_model):
        raise ValueError(
            f"the attention implementation is {language_model.config._attn_implementation!r}, which takes no packed "
            "rows; call prepare_model(model) first"
        )
    backend = backend_for(model, plan.input_ids.device, attention_backend)
    with packed_row(plan.paths, backend) as inputs:
        return body(inputs)


def score(
    model: nn.Module,
    plan: Plan,
    *,
    attention_backend: str = "auto",
    router_losses: list[torch.Tensor] | None = None,
    **head_options,
) -> SequenceStats:
    """Score every sequence of a plan.

    Args:
        model: a causal LM (or a PEFT model around one) after `prepare_model`. Distributed wrappers: `score_wrapped`.
        plan: on the model's device.
        attention_backend: a name of `attention_backends.BACKENDS`, or "auto"; of a shared row.
        router_losses: receives the plan's `routers.router_loss`, of a model that `check_router_loss` lets pass.
        head_options: passed to `amopo_kernels.linear_sequence_stats` (backend, logits_cache_bytes, ...).

    Returns:
        SequenceStats with S = pairs * K * 2 entries; `logp_sum` is differentiable in the model's parameters.

    Raises:
        ValueError: the model was not prepared (or its attention implementation was changed since), the plan is of
            another layout, a sequence is too long for its RoPE (`architecture.position_limit`), or the attention
            backend cannot be used.
    """
    hidden = hidden_states(model, plan, attention_backend, router_losses).index_select(0, plan.label_rows)
    language_model = language_model_of(model)
    form = choice_of(model).head
    if form is None:
        (logps,) = own_logps(language_model, hidden, plan.labels)
        return amopo_kernels.sequence_stats(logps, plan.cu_seqlens)

    def statistics(rows: torch.Tensor) -> SequenceStats:
        weight, bias = head_of(language_model)
        return amopo_kernels.linear_sequence_stats(
            rows,
            weight,
            plan.labels,
            plan.cu_seqlens,
            bias,
            softcap=form.softcap,
            temperature=form.temperature,
            **head_options,
        )

    # As the head module's forward: FSDP2 and ZeRO-3 gather its weight in hooks around that call and nowhere else.
    head_module = language_model.get_output_embeddings()
    return call_as_forward(head_module, head_module, statistics, hidden)


def score_wrapped(wrapped: nn.Module, model: nn.Module, plan: Plan, **head_options) -> SequenceStats:
    """`score` run as the forward of `wrapped`, so that DDP, FSDP and DeepSpeed see their forward pass.

    Their hooks gather sharded parameters (the head's among them) and prepare gradient reduction around
    `wrapped.forward`, which ends in `model.forward`; for one call, that is the scoring step.
    """
    return call_as_forward(wrapped, model, lambda: score(model, plan, **head_options))

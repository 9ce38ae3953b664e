"""The scoring step: a model and a plan in, the statistics of every sequence out. Knows no trainer.

    plan -> model body -> hidden rows that predict a label -> lm_head inside the kernel -> SequenceStats

Only label rows reach the head and no logits are materialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

import amopo_kernels
from amopo_fast.models.architecture import (
    BEYOND_LIMIT,
    attention_needs,
    causal_lm,
    decoder_of,
    head_of,
    position_limit,
)
from amopo_fast.models.attention import is_switched, packed_attention
from amopo_fast.models.attention_backends import choose_backend
from amopo_fast.packing.plan import Plan
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels import SequenceStats


def check_lengths(model: nn.Module, pairs: Iterable[PairTokens]) -> None:
    """Refuse pairs that are too long to be packed exactly (`architecture.position_limit`).

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
            long for its RoPE (`architecture.position_limit`), or the attention backend cannot be used.
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

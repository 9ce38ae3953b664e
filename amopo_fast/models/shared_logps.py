"""Log-probs of completions for trainers of others: what their sequences have in common is computed once.

    token ids -> Plan -> hidden rows that predict a completion's token -> amopo_kernels.linear_logps

GRPO scores 8 to 64 completions of a prompt, DPO two: a batch's equal beginnings, whole prompts or parts of them, are
nodes of one trie (docs/packing.md). Log-probs and all gradients are those of the separate sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor, nn

from amopo_fast.models.architecture import language_model_of, vocabulary_of
from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.head import own_logps
from amopo_fast.models.scoring import hidden_states
from amopo_fast.packing.plan import Plan, plan_sequences
from amopo_fast.packing.trie import Sequences
from amopo_kernels.integrations.hf import LinearLogps, call_as_forward, causal_lm, tokens_of

TokenIds: TypeAlias = Sequence[int] | np.ndarray | Tensor


def shared_logps(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    temperature: float = 1.0,
    return_entropy: bool = False,
    *,
    attention_backend: str = "auto",
    backend: str = "auto",
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Log-prob of every completion token, given its prompt and the completion before it.

    Args:
        model: a causal LM that trains here, also inside of PEFT, DDP or FSDP. It is tried and switched at the first
            call (`prepare_model`); where its weights are sharded, call `prepare_model` before that. Under accelerate's
            mixed precision call this inside of `accelerator.autocast()`.
        prompts, completions: S sequences of token ids each: lists, arrays or tensors (L_i,), ragged and without
            padding. completions[i] follows prompts[i], so a prompt of G completions stands there G times. An empty
            completion has no log-probs.
        temperature: what logits are divided by, on top of the model's own scale.
        return_entropy: also the entropy, in nats, of the distribution that each token was drawn from.
        attention_backend: a name of `attention_backends.BACKENDS`, or "auto"; backend: of `linear_logps`.

    Returns:
        S tensors (len(completions[i]),), float32, float64 for a float64 model, on the model's device, differentiable in
        the model's parameters; or (logps, entropies), both so.

    Raises:
        UnsupportedModelError: the model cannot be trained here. ValueError: lengths that differ, an empty prompt, token
            ids that are none, a temperature that is not positive, a sequence beyond the model's positions.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    sequences = sequences_of_tokens(prompts, completions, vocabulary_of(causal_lm(model)))
    prepare_once(model)
    inner = causal_lm(model)
    plan = plan_sequences(sequences, choice_of(inner).layout).to(inner.get_input_embeddings().weight.device)

    def of_labels() -> tuple[Tensor, ...]:
        hidden = hidden_states(inner, plan, attention_backend).index_select(0, plan.label_rows)
        return _scored(inner, hidden, plan, temperature, return_entropy, backend)

    # As the forward of the outermost wrapper: DDP and FSDP gather parameters and reduce gradients around that.
    found = call_as_forward(model, inner, of_labels)
    lengths = plan.cu_seqlens.diff().tolist()
    logps, *entropies = [list(x.split(lengths)) for x in found]
    return (logps, entropies[0]) if return_entropy else logps


def _scored(
    model: nn.Module, hidden: Tensor, plan: Plan, temperature: float, return_entropy: bool, backend: str
) -> tuple[Tensor, ...]:
    """(logps (N,),) or (logps, entropies) of hidden (N, H)."""
    language_model = language_model_of(model)
    form = choice_of(model).head
    if form is None:
        return own_logps(language_model, hidden, plan.labels, temperature=temperature, return_entropy=return_entropy)
    head = LinearLogps(
        language_model.get_output_embeddings(), form.softcap, form.temperature, tokens_of(language_model.config)
    )
    outputs = ("entropy",) if return_entropy else ()
    found = head(hidden, plan.labels, temperature=temperature, outputs=outputs, backend=backend)
    return found if return_entropy else (found,)


def prepare_once(model: nn.Module) -> None:
    """`prepare_model` of what is inside DDP or torch.compile, unless it was called before."""
    if hasattr(language_model_of(causal_lm(model)), "amopo_choice"):
        return
    while not hasattr(model, "get_base_model") and model is not causal_lm(model):
        model = getattr(model, "_orig_mod", None) or model.module
    prepare_model(model)


def sequences_of_tokens(prompts: Sequence[TokenIds], completions: Sequence[TokenIds], vocabulary: int) -> Sequences:
    """The sequences of a batch, those with an empty completion absent.

    Raises:
        ValueError: `shared_logps`.
    """
    if len(prompts) != len(completions) or not len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(completions)} completions; give one prompt for each completion, the same "
            "one as often as it has completions"
        )
    parts, prompt_lengths, lengths = [], [], []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        both = _ids("prompt", number, prompt, vocabulary), _ids("completion", number, completion, vocabulary)
        if not len(both[0]):
            raise ValueError(f"prompt {number} has no tokens; give at least a token that begins the text")
        present = len(both[1]) > 0
        parts += both if present else ()
        prompt_lengths.append(len(both[0]) * present)
        lengths.append((len(both[0]) + len(both[1])) * present)
    if not parts:
        raise ValueError("every completion is empty: nothing is scored")
    ends = np.cumsum(lengths)
    return Sequences(np.concatenate(parts), ends - lengths, np.array(prompt_lengths), np.array(lengths), len(lengths))


def _ids(name: str, number: int, tokens: TokenIds, vocabulary: int) -> np.ndarray:
    ids = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
    if ids.ndim != 1 or len(ids) and ids.dtype.kind not in "iu":
        raise ValueError(f"{name} {number} is {ids.dtype} of shape {ids.shape}; give token ids in one dimension")
    ids = ids.astype(np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(bad):
        raise ValueError(
            f"{name} {number} has id {ids[bad[0]]} at {bad[0]}, the model has {vocabulary} tokens; leave padding and "
            "ignored labels out"
        )
    return ids

"""Shared prefixes in TRL's trainers: `share_prefixes(trainer)`, written against TRL 1.16.

TRL's DPO, GRPO and RLOO score a padded batch by one call, model(input_ids, attention_mask, labels, fused_lm_head=True).
For that call the model's body runs over the batch's trie of tokens, each common beginning once, and its hidden states
are put where the padded batch has them; all else (the head, losses, metrics, adapters, the reference) stays TRL's.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from amopo_fast.errors import OptionError
from amopo_fast.models.architecture import vocabulary_of
from amopo_fast.models.choice import choice_of
from amopo_fast.models.scoring import hidden_states
from amopo_fast.models.shared_logps import prepare_once, sequences_of_tokens
from amopo_fast.packing.plan import plan_sequences
from amopo_kernels import UnsupportedError
from amopo_kernels.integrations.hf import call_as_forward, causal_lm
from amopo_kernels.integrations.trl import patch_trl

_KNOWN = {"input_ids", "attention_mask", "use_cache", "labels"}


def share_prefixes(trainer, *, attention_backend: str = "auto", backend: str = "auto") -> None:
    """Let a TRL trainer compute what the sequences of a batch begin with together once, its reference model too.

    Only sequences of one call share: a DPO pair always, the completions of a GRPO prompt as far as they lie in one
    micro-batch (`steps_per_generation=1` keeps them together). Log-probs, losses, metrics and gradients stay as they
    are. The head becomes that of `amopo_kernels.integrations.trl.patch_trl`, which reads scored tokens alone.

    Args:
        trainer: a DPOTrainer, GRPOTrainer or RLOOTrainer, made and not yet trained. attention_backend: a name of
            `attention_backends.BACKENDS`, or "auto". backend: of `linear_logps`.

    Raises:
        UnsupportedModelError: the model cannot be trained here. OptionError: an option of the trainer for which its
            batches are no rows of single sequences. UnsupportedError: another trainer, or another TRL's.
    """
    if getattr(trainer, "padding_free", False):
        raise OptionError("padding_free=True lays sequences end to end, where none is shared; set it False, as shared "
                          "prefixes leave no padding either", "padding_free")  # fmt: skip
    if getattr(trainer, "aux_loss_enabled", False):
        raise OptionError("a router's loss depends on how often each token is computed; set output_router_logits=False "
                          "in the model's configuration", "output_router_logits")  # fmt: skip
    if hasattr(trainer, "concatenated_forward"):
        raise UnsupportedError(f"{type(trainer).__name__} does not score by TRL's fused head, where prefixes are "
                               "shared; take its log-probs from amopo_fast.shared_logps")  # fmt: skip
    patch_trl(trainer, backend=backend)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            prepare_once(model)
            _share(causal_lm(model), attention_backend)


def _share(model: nn.Module, attention_backend: str) -> None:
    own_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at its arguments
    def forward(self, *arguments, fused_lm_head: bool = False, **inputs):
        if not fused_lm_head:
            return own_forward(*arguments, **inputs)
        unknown = sorted(name for name, value in inputs.items() if name not in _KNOWN and value is not None)
        if arguments or unknown or inputs.get("attention_mask") is None:
            raise OptionError(
                f"a batch has {', '.join(unknown) or 'no attention_mask'}; prefixes are shared between texts alone, in "
                "padded batches", unknown[0] if unknown else "attention_mask",
            )  # fmt: skip
        body = functools.partial(_padded_hidden_states, self, inputs["labels"], attention_backend)
        run = functools.partial(own_forward, fused_lm_head=True)
        return call_as_forward(run, self.base_model, body, **inputs)

    model.forward = types.MethodType(forward, model)


def _padded_hidden_states(
    model: nn.Module, labels: Tensor, attention_backend: str, input_ids: Tensor, attention_mask: Tensor, **_
) -> BaseModelOutputWithPast:
    """A body's output over a padded batch (B, T): hidden states (B, T, H), 0 where they predict nothing."""
    ids, real, scored = (x.cpu() for x in (input_ids, attention_mask != 0, labels != -100))
    prompts, completions, places = [], [], []
    for row, (tokens, here, wanted) in enumerate(zip(ids, real, scored, strict=True)):
        begin, end = _range(here)
        first, last = _range(wanted)
        if not here[begin:end].all():
            raise ValueError(f"row {row}: attention_mask has holes; sequences must be padded at their ends alone")
        if last > first and (first <= begin or last > end):
            raise ValueError(
                f"row {row}: tokens {first} to {last} are scored, its text is {begin} to {end}; the first token of a "
                "text follows none"
            )
        prompts.append(tokens[begin:first] if last > first else tokens[begin:end])
        completions.append(tokens[first:last])
        places.append(torch.arange(first - 1, last - 1) + row * len(tokens) if last > first else tokens[:0])
    if not any(map(len, completions)):  # all rows are masked: the model's own way, and a loss of 0
        return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    plan = plan_sequences(sequences_of_tokens(prompts, completions, vocabulary_of(model)), choice_of(model).layout)
    plan = plan.to(input_ids.device)
    hidden = hidden_states(model, plan, attention_backend).index_select(0, plan.label_rows)
    padded = hidden.new_zeros(labels.numel(), hidden.shape[-1])
    padded = padded.index_copy(0, torch.cat(places).to(hidden.device), hidden)
    return BaseModelOutputWithPast(last_hidden_state=padded.view(*labels.shape, -1))


def _range(mask: Tensor) -> tuple[int, int]:
    """From the first True to behind the last; (0, 0) where there is none."""
    places = mask.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)

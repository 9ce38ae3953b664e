"""verl's fused forward on this head: `patch_verl(model)`, written against the signature of verl 0.9.

verl calls `model(input_ids, position_ids, ..., temperature=, shift_labels=, return_dict=True)` with
`use_remove_padding` and `use_fused_kernels`, and reads log_probs and entropy of (1, tokens) or (B, T).
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedError
from .hf import LinearLogps, causal_lm


class PPOOutput(NamedTuple):
    """What verl reads of a fused forward. Entry t is of the token after t; the last of a row has no meaning."""

    log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    loss: Any = None


def patch_verl(
    model: nn.Module, *, process_group: dist.ProcessGroup | None = None, backend: str = "auto"
) -> None:
    """Replace a causal LM's forward by one that verl's actor takes with `use_fused_kernels`; in the place of verl's
    `patch_forward_with_backends`, before FSDP wraps the model.

    Unlike verl's, it knows softcaps, logit scales and biases, takes a temperature of each token or row, computes no
    row whose label is -100, and gives float32 entropies. Under tensor parallelism of the head, process_group has its
    ranks: nothing of the vocabulary is gathered.

    Raises:
        UnsupportedError: `LinearLogps.from_model`.
    """
    model = causal_lm(model)
    head = LinearLogps.from_model(model)

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                shift_labels: Tensor | None = None, temperature: float | Tensor = 1.0, return_dict: bool | None = True,
                use_cache: bool | None = None, logits_to_keep: int = 0, **inputs) -> PPOOutput:  # fmt: skip
        if not return_dict or logits_to_keep:
            raise UnsupportedError("a fused forward returns log_probs of all tokens, by name: set return_dict=True")
        body = self.base_model(input_ids=input_ids, use_cache=False, **inputs)
        if shift_labels is None:
            source = input_ids if labels is None else labels
            if source is None:
                raise ValueError("give input_ids, labels or shift_labels; the next tokens are taken from them")
            shift_labels = torch.roll(source, -1, -1)
        if isinstance(temperature, Tensor):  # of every row (B,) or token
            temperature = temperature.reshape(*temperature.shape, *[1] * (shift_labels.dim() - temperature.dim()))
            temperature = temperature.expand_as(shift_labels)
        log_probs, entropy = head(
            body[0], shift_labels, temperature=temperature, outputs=("entropy",), process_group=process_group,
            backend=backend,
        )  # fmt: skip
        return PPOOutput(log_probs, entropy, hidden_states=getattr(body, "hidden_states", None))

    model.forward = types.MethodType(forward, model)

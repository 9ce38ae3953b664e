"""From hidden states to log-probs: the output head of a causal LM as amopo_kernels takes it, or the model's own.

Most heads are softcap(x W^T + b) with a scale before or after the cap. Which scales of its configuration a class
applies, and where, differs: so the model's own forward is asked, with random hidden states in the body's place
(`head_errors`), which costs one product with the head. What a miniature found is compared with the real model when a
run begins (real_logits.py). What is no such head (a transform before it, a scale per token)
is computed by the model's own forward, in slices of the label rows.
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from amopo_fast.errors import OptionError
from amopo_fast.models.architecture import UnsupportedModelError, decoder_of
from amopo_kernels.integrations.hf import DIVISORS, FACTORS, SOFTCAPS, call_as_forward, tokens_of

OWN_HEAD_ROWS = 1024  # label rows whose logits the model's own head holds at a time

SPREAD = 20.0  # standard deviation of the logits that are compared: a softcap of 30 shows
_LOWEST = -1e30  # a log-prob that is a number, of what has none


@dataclass(frozen=True)
class HeadForm:
    """How logits come from x W^T + b, as amopo_kernels has it: capped, then divided by the temperature."""

    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw / self.temperature


class _Body(BaseModelOutputWithPast):
    """A body's output that has whatever a model looks for in it: None."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def text_only(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a multimodal class wants to be told, beside ids (B, T), of tokens that are all text."""
    name = "mm_token_type_ids"
    kinds = {name: torch.zeros_like(ids)} if name in inspect.signature(model.forward).parameters else {}
    return kinds | no_images(model, ids)


def no_images(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What IDEFICS, or its decoder, wants in the place of images: one that no token of ids (B, T) sees. Others: {}."""
    name, mask = "image_encoder_embeddings", "image_attention_mask"
    if not {name, mask} <= inspect.signature(model.forward).parameters.keys():
        return {}
    image = torch.zeros(len(ids), 1, 1, model.config.vision_config.embed_dim, dtype=model.dtype, device=ids.device)
    return {name: image, mask: ids.new_zeros(*ids.shape, 1)}


def own_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """(N, V) logits of the causal LM's own forward, with hidden (N, H) in the place of its body's output."""
    body = _Body(last_hidden_state=hidden[None])
    input_ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    # forward, not a call: hooks around the model run once, and this is inside of them. accelerate's mixed precision
    # wraps it in an autocast of its own, which is not what is asked about.
    forward = vars(model).get("_original_forward") or model.forward
    output = call_as_forward(forward, decoder_of(model), lambda *args, **kwargs: body,
                             input_ids=input_ids, use_cache=False, **text_only(model, input_ids))  # fmt: skip
    return output.logits[0]


def own_logps(
    model: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(log-probs of labels,), or (log-probs, entropies in nats): (N,) each, float32 (float64 for float64).

    OWN_HEAD_ROWS rows of logits are in memory at a time.
    """

    head = model.get_output_embeddings()

    def of_rows(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if isinstance(head, FSDPModule):
            head.unshard()  # torch 2.11 leaves it sharded where a second slice is computed again
        logits = own_logits(model, rows)
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        logps = log_p.gather(1, labels[:, None])[:, 0]
        if not return_entropy:
            return (logps,)
        return logps, -(log_p.exp() * log_p.clamp(min=_LOWEST)).sum(-1)  # 0 log 0 = 0

    if len(hidden) <= OWN_HEAD_ROWS:
        return of_rows(hidden, labels)
    slices = zip(hidden.split(OWN_HEAD_ROWS), labels.split(OWN_HEAD_ROWS), strict=True)
    found = [checkpoint(of_rows, *part, use_reentrant=False) for part in slices]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def head_forms(config: PretrainedConfig) -> list[HeadForm]:
    """What a head may be by the scales that its configuration names; as many, in one order, for every size."""
    text = config.get_text_config()
    scales = [value for name in FACTORS + DIVISORS if (value := getattr(text, name, None))]
    if getattr(text, "dim_model_base", None):  # MiniCPM scales the hidden states before the head
        scales.append(text.hidden_size / text.dim_model_base)
    powers = itertools.product((0, -1, 1), repeat=len(scales))
    factors = [math.prod(s**p for s, p in zip(scales, power, strict=True)) for power in powers]
    caps = [float(value) for name in SOFTCAPS if (value := getattr(text, name, None))]
    capped = [HeadForm(c, 1 / factor) for cap in caps for factor in factors for c in (cap, cap / factor)]
    return [*capped, *(HeadForm(None, 1 / factor) for factor in factors)]


@torch.no_grad()
def head_errors(model: nn.Module) -> list[float] | None:
    """Relative error of each of `head_forms` against the logits of the model's own forward; None for another head.

    Raises:
        UnsupportedModelError: it has no output embeddings, or its forward does not run over given hidden states.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError("it has no output embeddings; AMoPO trains causal language models")
    weight = next(head.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, model.config.get_text_config().hidden_size, generator=generator, dtype=torch.float32)
    hidden = hidden.to(weight)
    try:
        spread = own_logits(model, hidden).double().std()
        hidden = hidden * (SPREAD / spread.clamp(min=1e-6)).to(hidden)
        own = own_logits(model, hidden).double()
    except Exception as error:
        raise UnsupportedModelError(
            f"its forward does not run over given hidden states ({type(error).__name__}: {error})"
        ) from error
    if plain_class(head) is not nn.Linear or weight.shape[1] != hidden.shape[1]:
        return None
    raw = nn.functional.linear(hidden, *head_of(model)).double()
    if raw.shape != own.shape:
        return None
    return [float((form.logits(raw) - own).abs().mean() / own.abs().mean()) for form in head_forms(model.config)]


def check_head(model: nn.Module, form: HeadForm | None) -> None:
    """Refuse a head that is no nn.Linear where the kernels are to be one; None: its own, whatever it is.

    Raises:
        OptionError: an adapter or quantisation on lm_head.
    """
    head = model.get_output_embeddings()
    if form is not None and plain_class(head) is not nn.Linear:
        raise OptionError(
            f"lora_target_modules: lm_head is a {type(head).__name__}, not nn.Linear: adapters and quantisation on "
            "lm_head are not supported; leave lm_head out of target_modules (and in llm_int8_skip_modules), or merge "
            "it first", "lora_target_modules",
        )  # fmt: skip


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; FSDP2 replaces it by a subclass of FSDPModule and it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def head_of(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight (V, H), bias (V,) or None) of a causal LM's plain head, inside of its call, where they are gathered."""
    head = model.get_output_embeddings()
    tokens = tokens_of(model.config)
    return head.weight[:tokens], None if head.bias is None else head.bias[:tokens]

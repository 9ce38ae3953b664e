"""Log-probabilities of a Hugging Face causal LM without its logits.

`LinearLogps.from_model` reads what the model's class does between its head and its logits (a scale, a softcap), and
asks the model's own forward, with random hidden states in the body's place, whether that is all. `model_logps` runs a
model up to its head.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..head import linear_logps
from .adapters import linear_of, operands

# What a configuration may call the softcap, a factor of the logits before it, and a divisor.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLIED_BY_ITS_DIVISOR = ("hyperclovax",)  # model types that multiply by `logits_scaling`


@dataclass(frozen=True)
class LinearLogps:
    """linear_logps with the head of a model: `LinearLogps.from_model(model)(hidden, labels)`.

    The head's tensors are read at every call, as the head module's forward, so that what FSDP2 and ZeRO-3 gather around
    that call is there. LoRA on the head is [h, s h A^T] [W, B]^T, exactly, at the cost of a copy of W a call and of
    dW for the frozen part: where that is too much, leave lm_head out of `target_modules`.
    """

    head: nn.Module  # nn.Linear, or PEFT's LoRA or trained copy of one
    softcap: float | None = None
    temperature: float = 1.0  # the model's own: what it divides capped logits by
    tokens: int | None = None  # rows of the head's weight that are tokens; None: all. The rest pads the vocabulary

    @classmethod
    def from_model(cls, model: nn.Module) -> LinearLogps:
        """The head of a causal LM; wrappers (PEFT, DDP, torch.compile) are looked through.

        Raises:
            UnsupportedError: the head is not linear, or what the model makes of its logits is not known here: its own
                forward gives others. (Not compared where the head's weight is sharded or on meta.)
        """
        model = causal_lm(model)
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{type(model).__name__} has no output embeddings; it is no causal language model")
        found = cls(head, *_softcap_and_temperature(model.config), tokens_of(model.config))
        _compare_with_own_logits(model, found)
        return found

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        outputs: Sequence[str] = (),
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        validate: bool | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """linear_logps of hidden (..., H), labels (...), -100 ignored; `temperature` on top of the model's own.

        Under tensor parallelism of the head, process_group has its ranks, on which hidden and labels are the same.
        """

        def logps(hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
            x, weight, bias = operands(self.head, hidden.to(linear_of(self.head).weight.device))
            if self.tokens is not None:
                weight, bias = weight[: self.tokens], None if bias is None else bias[: self.tokens]
            return linear_logps(
                x, weight, labels.to(x.device), bias, softcap=self.softcap, temperature=self.temperature * temperature,
                outputs=outputs, process_group=process_group, backend=backend, validate=validate,
            )  # fmt: skip

        if process_group is not None:
            return logps(hidden)  # tensor parallelism's hooks around the head's call distribute and gather logits
        return call_as_forward(self.head, self.head, logps, hidden)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside of wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
            model = model.module
        else:
            return model


def call_as_forward(called: nn.Module, module: nn.Module, function: Callable, *arguments, **options):
    """`called(*arguments)` with `module.forward` being `function`, for this one call."""
    own_forward = vars(module).get("forward")

    def restore() -> None:
        if own_forward is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own_forward

    def forward(*arguments, **options):
        restore()
        return function(*arguments, **options)

    module.forward = forward
    try:
        return called(*arguments, **options)
    finally:
        restore()


def tokens_of(config) -> int | None:
    """How many rows of a head are tokens where a vocabulary is padded and the model cuts its logits; None: all."""
    return getattr(config.get_text_config(), "unpadded_vocab_size", None)


def _softcap_and_temperature(config) -> tuple[float | None, float]:
    """A factor f before the cap, c tanh(f z / c), is a cap of c / f and a temperature of 1 / f."""
    text = config.get_text_config()

    def first(names: Sequence[str]) -> float | None:
        return next((float(value) for name in names if (value := getattr(text, name, None)) is not None), None)

    factor = first(FACTORS)
    if factor is None and (divisor := first(DIVISORS)):
        factor = divisor if text.model_type in _MULTIPLIED_BY_ITS_DIVISOR else 1 / divisor
    factor = 1.0 if factor is None else factor
    softcap = first(SOFTCAPS)
    return None if softcap is None else softcap / factor, 1 / factor


class _Body:
    """A body's output that has whatever a model looks for in it: its hidden states, and None."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]


@torch.no_grad()
def _compare_with_own_logits(model: nn.Module, found: LinearLogps) -> None:
    weight = linear_of(found.head).weight
    if weight.is_meta or not weight.numel() or type(weight).__name__ == "DTensor":
        return
    hidden = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)

    def own(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=weight.device)
        # The class's forward: one that was put on the model may cast or do something else.
        forward = functools.partial(type(model).forward, model, input_ids=ids, use_cache=False)
        body = model.base_model
        output = call_as_forward(forward, body, lambda *args, **options: _Body(hidden[None]))
        return output.logits[0].float()

    with torch.autocast(weight.device.type, enabled=False), _without_adapters(found.head):
        hidden *= (20 / own(hidden).std().clamp(min=1e-6)).to(hidden.dtype)  # so that a softcap of 30 shows
        wanted = own(hidden)
        linear = linear_of(found.head)
        logits = nn.functional.linear(hidden, linear.weight, linear.bias).float()[:, : found.tokens]
    if found.softcap is not None:
        logits = found.softcap * torch.tanh(logits / found.softcap)
    error = (logits / found.temperature - wanted).abs().mean() / wanted.abs().mean()
    if not error < 8 * torch.finfo(weight.dtype).eps:
        raise UnsupportedError(
            f"the logits of {type(model).__name__} differ by {error:.1e} from those of its head with softcap "
            f"{found.softcap} and temperature {found.temperature:g}: it does something to them that is not known here; "
            "if it is a factor or a softcap, give it yourself: LinearLogps(head, softcap, temperature)"
        )


class _without_adapters:
    """The head's base alone, while the model's own logits are looked at."""

    def __init__(self, head: nn.Module):
        adapted = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
        self.head = head if adapted and not getattr(head, "merged", False) else None

    def __enter__(self) -> None:
        if self.head is not None:
            self.were_disabled = self.head.disable_adapters
            self.head._disable_adapters = True

    def __exit__(self, *_) -> None:
        if self.head is not None:
            self.head._disable_adapters = self.were_disabled


class _Request(NamedTuple):
    """What `model_logps` asks of a model, through any wrapper around it."""

    labels: Tensor  # (B, T), of the next token each
    temperature: float | Tensor
    outputs: tuple[str, ...]
    process_group: dist.ProcessGroup | None
    backend: str


def install(model: nn.Module) -> None:
    """Let a causal LM answer `model_logps`, and do what it did. To be called before accelerate wraps forwards."""
    model = causal_lm(model)
    if getattr(model, "_answers_model_logps", False):
        return
    if "forward" in vars(model):
        raise UnsupportedError(
            f"the forward of this {type(model).__name__} was replaced already (by accelerate's mixed precision or by "
            "TRL); call amopo_kernels.integrations.hf.install(model) before that, or patch_trl(trainer)"
        )
    linear_logps_of_head = LinearLogps.from_model(model)
    own_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at its arguments
    def forward(self, *arguments, _logps: _Request | None = None, **inputs):
        if _logps is None:
            return own_forward(*arguments, **inputs)
        inputs.pop("labels", None)  # PEFT passes None
        hidden = self.base_model(*arguments, **inputs | {"use_cache": False})[0]
        labels, *options = _logps
        hidden = hidden[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens before them
        return linear_logps_of_head(hidden, labels, **dict(zip(_Request._fields[1:], options, strict=True)))

    model.forward = types.MethodType(forward, model)
    model._answers_model_logps = True


def model_logps(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[str] = (),
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **inputs,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of every token of a batch but the first, under the tokens before it.

    Args:
        model: a causal LM, also inside of PEFT, DDP or FSDP.
        input_ids: (B, T). inputs: what else the model takes: attention_mask, position_ids, pixel_values, ...
        labels: (B, T) as transformers has them, not shifted: -100 where a token is not scored. Instead of them
            completion_mask: (B, T), 0 where a token is not scored. Neither: all tokens are.
        temperature: a number, or a tensor (B, T - 1) or (B, 1), on top of the model's own.
        outputs, process_group, backend: of `linear_logps`; under tensor parallelism of the head, its group.

    Returns:
        logps (B, T - 1), or (logps, *outputs): entry t is of token t + 1, and 0 where it is not scored.

    Raises:
        ValueError: labels and completion_mask. UnsupportedError: `LinearLogps.from_model`; a model whose forward was
        replaced, see `install`. Otherwise as `linear_logps`.
    """
    if labels is not None and completion_mask is not None:
        raise ValueError("labels and completion_mask say the same; give one of them")
    if labels is None:
        labels = input_ids if completion_mask is None else input_ids.masked_fill(completion_mask == 0, -100)
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must be {tuple(input_ids.shape)} as input_ids, got {tuple(labels.shape)}")
    install(model)
    # The last token predicts nothing here.
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if isinstance(temperature, Tensor):
        temperature = nn.functional.pad(temperature.expand_as(labels[:, 1:]), (0, 1), value=1.0)
    request = _Request(following, temperature, tuple(outputs), process_group, backend)
    found = model(input_ids=input_ids, _logps=request, **inputs)
    return tuple(x[:, :-1] for x in found) if outputs else found[:, :-1]

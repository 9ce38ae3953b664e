"""Which models can be packed: reasons to refuse one, and a check that runs the model's own architecture in miniature.

Packing is exact if tokens of a row meet each other in the attention interface only, and there as the plan says. A model
class promises neither, so `check_packing` tries it: the same class and configuration flags with small sizes and random
weights, float32, on the CPU; a packed row against its sequences one by one, log-probs and all gradients. It takes about
a tenth of a second and nothing of the model itself is touched.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from amopo_fast.models.architecture import UnsupportedModelError, causal_lm, refusal
from amopo_fast.models.attention import switch_attention
from amopo_fast.models.miniature import VOCABULARY, miniature
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan
from amopo_fast.prompts.tokens import PairTokens

_TOLERANCE = 1e-4  # relative; float32 rounding stays under 1e-5, a wrong key or position is above 1e-2


def check_prompt_learning(model: nn.Module) -> None:
    """Refuse PEFT methods that put virtual tokens before the prompt: a packed row has no place for them."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT's {config.peft_type.value} adds virtual tokens, which packed rows do not carry; use LoRA"
            )


def _check_pairs() -> list[PairTokens]:
    """Two pairs, three dimensions: shared prompts and response prefixes, a branch inside the window, one token."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, count)

    pairs = []
    for record in range(2):
        head, opening = draw(9), draw(6)
        prompts = (head, np.concatenate([head, draw(11)]), np.concatenate([head[:5], draw(4)]))
        chosen, rejected = np.concatenate([opening, draw(12)]), np.concatenate([opening, draw(3)])
        pairs.append(PairTokens(record, prompts, chosen, rejected if record else opening[:1], False))
    return pairs


def _reinitialise(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform: the usual 0.02 would hide a wrong key."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() < 2 else 1.5 / parameter.shape[-1] ** 0.5
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.data = parameter.data + 0.1 * noise if parameter.dim() < 2 else scale * noise


def prepare_model(model: nn.Module) -> nn.Module:
    """Check that a causal LM can be packed and switch it to packed attention, in place.

    Padded batches and generate() of the same object keep running as before.

    Raises:
        UnsupportedModelError: `check_packing`.
    """
    check_prompt_learning(model)
    check_packing(causal_lm(model))
    switch_attention(causal_lm(model))
    return model


def check_packing(model: nn.Module) -> None:
    """Refuse a causal LM that packed rows would train wrongly.

    Raises:
        UnsupportedModelError: with the reason: the configuration's own (`refusal`), a miniature that cannot be built or
            run, or log-probs or gradients of the miniature that differ between a packed row and separate sequences.
    """
    name, config = type(model).__name__, model.config
    reason = refusal(config)
    if reason:
        raise UnsupportedModelError(f"{name} cannot be packed: {reason}")
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        raise UnsupportedModelError(
            f"{name} cannot be packed: it does not use transformers' attention interface, so a packed row would mix "
            "its sequences"
        )
    try:
        tiny = miniature(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be packed: its architecture could not be tried in miniature "
            f"({type(error).__name__}: {error})"
        ) from error
    device = next(tiny.parameters()).device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small only wait for each other's threads
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _reinitialise(tiny)
            _compare(tiny, name)
    finally:
        torch.set_num_threads(threads)


def _compare(tiny: nn.Module, name: str) -> None:
    pairs = _check_pairs()
    device = next(tiny.parameters()).device
    weights = torch.linspace(-1.0, 1.0, 5, device=device)

    def gradients(logps: torch.Tensor) -> dict[str, torch.Tensor]:
        tiny.zero_grad()
        (logps * weights[torch.arange(len(logps)) % 5]).sum().backward()
        return {key: p.grad.clone() for key, p in tiny.named_parameters() if p.grad is not None}

    try:
        separate = []
        for pair in pairs:
            for prompt in pair.prompts:
                for response in (pair.chosen, pair.rejected):
                    ids = torch.from_numpy(np.concatenate([prompt, response])).to(device)
                    logits = tiny(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                    separate.append(logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].sum())
        expected = torch.stack(separate)
        expected_gradients = gradients(expected)
        switch_attention(tiny)
        plan = build_plan(pairs, min_node_tokens=3).to(device)
        packed = score(tiny, plan, attention_backend="sdpa", backend="torch").logp_sum
        packed_gradients = gradients(packed)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be packed: its miniature does not run packed ({type(error).__name__}: {error})"
        ) from error
    error = float(((packed - expected).abs() / expected.abs()).max().detach())
    if not error < _TOLERANCE:
        raise UnsupportedModelError(
            f"{name} cannot be packed: in its miniature the log-probs of a packed row differ from those of separate "
            f"sequences by {error:.1e}; something besides attention looks along the row, or the logits are not those "
            "of lm_head"
        )
    # Some gradients are zero but for rounding (a key's bias), so a floor keeps their noise out.
    floor = 1e-3 * max(value.norm() for value in expected_gradients.values())
    for key, value in expected_gradients.items():
        other = packed_gradients.get(key, torch.zeros_like(value))
        error = float((other - value).norm() / value.norm().clamp(min=floor))
        if not error < 10 * _TOLERANCE:
            raise UnsupportedModelError(
                f"{name} cannot be packed: in its miniature the gradient of {key} differs between a packed row and "
                f"separate sequences by {error:.1e}"
            )

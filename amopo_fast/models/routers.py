"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6) of a row.

    E * sum_e f_e P_e        f_e: choices of expert e per token, P_e: its mean router probability, over all layers

as transformers has it, over the tokens of the separate sequences without padding: a token that several sequences share
is computed once and counts once for each of them (`Plan.token_uses`). transformers counts the last token of a sequence
too, which predicts nothing and is not computed here.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from amopo_fast.models.architecture import UnsupportedModelError, decoder_of, language_model_of
from amopo_fast.models.miniature import TOKENS, miniature

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_TOLERANCE = 1e-4  # relative, float32


def router_loss(router_logits: tuple[torch.Tensor, ...], chosen: int, uses: torch.Tensor) -> torch.Tensor:
    """0-d float32, differentiable in the logits.

    Args:
        router_logits: of each layer with experts (T, E). chosen: experts of a token. uses: (T,) weight of each token.
    """
    logits = torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in router_logits])  # (layers, T, E)
    probabilities = logits.float().softmax(-1)
    picked = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(chosen, -1).indices, 1.0)
    weights = uses.to(probabilities.dtype)[:, None]
    total = weights.sum() * len(router_logits)
    shares = (picked * weights).sum((0, 1)) / total
    return logits.shape[-1] * (shares * (probabilities * weights).sum((0, 1)) / total).sum()


def experts_per_token(model: nn.Module) -> int:
    """How many experts a token of a causal LM chooses."""
    text = language_model_of(model).config.get_text_config()
    return next((value for name in _CHOSEN if isinstance(value := getattr(text, name, None), int)), 0)


def check_router_loss(model: nn.Module) -> None:
    """Refuse a model whose class has no such loss, or another one: its miniature's own against `router_loss`.

    Raises:
        UnsupportedModelError
    """
    model = language_model_of(model)
    refused = f"router_aux_loss_coef: {type(model).__name__} "
    if "output_router_logits" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{refused}has no load-balancing loss in transformers; leave it out")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        tiny = miniature(model)
        ids = torch.randint(1, TOKENS, (1, 24))
        own = tiny(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
        logits = decoder_of(tiny)(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        ours = router_loss(logits, experts_per_token(tiny), torch.ones(ids.shape[1])) if logits else None
    if own is None or ours is None or not abs(ours - own) <= _TOLERANCE * abs(own):
        found = f"its miniature's is {own}, the published form {ours}"
        raise UnsupportedModelError(f"{refused}has no load-balancing loss of that form ({found}); leave it out")

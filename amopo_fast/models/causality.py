"""Why a model's own forward is no causal language model's, in words: what an error says when no layout is exact."""

from __future__ import annotations

import torch
from torch import nn

from amopo_fast.models.head import text_only
from amopo_fast.models.small_sizes import TOKENS

_LENGTH = 32  # tokens: beyond every window and chunk of a miniature
_DIFFERS = 1e-3  # relative to the logits' spread; float32's rounding stays under 1e-5


@torch.no_grad()
def not_causal(model: nn.Module) -> str:
    """What moves the logits of a miniature's earlier tokens: another last token, or one token less behind them.

    "" where nothing does, or where it does not run on text alone. Leaves the miniature in float32 and in inference.
    """
    model.float().eval()
    ids = torch.randint(1, TOKENS, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = TOKENS - other[0, -1]
    try:
        whole, changed, cut = (_logits(model, each) for each in (ids, other, ids[:, :-1]))
    except Exception:
        return ""
    if (moved := _moved(whole[:-1], changed[:-1])) > _DIFFERS:
        return f"it is not causal: another last token moves the logits of the tokens before it by {moved:.1e}"
    if (moved := _moved(whole[:-1], cut)) > _DIFFERS:
        return f"it is not causal: how many tokens follow moves the logits of those before them by {moved:.1e}"
    return ""


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T, V); what a forward draws at random, as Reformer's hashes, is drawn the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(input_ids=ids, use_cache=False, **text_only(model, ids)).logits[0]


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).abs().max() / before.std())

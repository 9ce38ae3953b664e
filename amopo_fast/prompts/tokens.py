"""Token ids of one pair: what the planner packs, the store keeps and the trainer trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PairTokens:
    """Token ids of one pair's 2K sequences; sequence (k, side) is concat(prompts[k], response of the side).

    Attributes:
        record: number of the record in its source.
        prompts: K int64 arrays, each ending in the assistant header; None where the dimension is absent.
        chosen, rejected: int64 arrays, the label tokens, each ending in the end-of-turn token.
        truncated: whether the user's text or a response was shortened to fit.
        score_gaps: (K,) float64, the chosen response's score minus the rejected one's by dimension, NaN where there are
            none (no_object); None: nothing is known of them.
        prompt_id: 64 bits that pairs of the same prompt share.
    """

    record: int
    prompts: tuple[np.ndarray | None, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    truncated: bool
    score_gaps: np.ndarray | None = None
    prompt_id: int = 0

    def gaps(self) -> np.ndarray:
        """(K,) float64, `score_gaps`, all NaN where nothing is known of them."""
        return np.full(len(self.prompts), np.nan) if self.score_gaps is None else self.score_gaps

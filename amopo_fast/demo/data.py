"""The demo's bundled pairs, and the control that they are learned from: pairs with shuffled labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from amopo_fast.data.pairs import DEFAULT_DIMENSIONS, Pair

TRAIN_FILE = Path(__file__).with_name("train.jsonl")
HELDOUT_FILE = Path(__file__).with_name("heldout.jsonl")
DIMENSIONS = DEFAULT_DIMENSIONS


def shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs with chosen and rejected (and their scores) swapped at random, each with probability 1/2.

    What is learned from them says how much of a result is not owed to the preferences.
    """
    rng = random.Random(seed)
    return [
        replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_scores=pair.rejected_scores,
            rejected_scores=pair.chosen_scores,
        )
        if rng.random() < 0.5
        else pair
        for pair in pairs
    ]

"""Random orders that are a pure function of a seed: the same on every machine and numpy version."""

from __future__ import annotations

import numpy as np


def shuffled_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), by sorting Philox bits."""
    return np.argsort(np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, 0]).random_raw(count), kind="stable")

"""What the functions of this package return. S sequences, N label rows, P pairs, K dimensions."""

from typing import NamedTuple

from torch import Tensor


class SequenceStats(NamedTuple):
    """Statistics of S sequences of token log-probabilities; float32 (float64 for float64 inputs) but for `length`.

    An empty sequence is an absent dimension: its entries are 0.
    """

    logp_sum: Tensor  # [S] sum of the sequence's log-probabilities, in nats; the only differentiable field
    length: Tensor  # [S] int32, tokens
    prob_mean: Tensor  # [S] mean of the token probabilities exp(logp)
    prob_std: Tensor  # [S] their unbiased standard deviation; 0 for one token
    logps: Tensor  # [N] the log-probabilities themselves, detached


class AMoPOLoss(NamedTuple):
    """The loss and what explains it. Entries of absent dimensions are 0: mask them by `SequenceStats.length`."""

    loss: Tensor  # [] the only differentiable field
    weights: Tensor  # [P, K] a_k, detached
    margins: Tensor  # [P, K] beta * (l_w - l_l) - gamma
    chosen_rewards: Tensor  # [P, K] beta * l_w
    rejected_rewards: Tensor  # [P, K] beta * l_l

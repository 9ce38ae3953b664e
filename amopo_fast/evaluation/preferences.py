"""What a model prefers: accuracy, margin, weights and token probabilities per dimension, without a trainer.

    model, pairs -> Scores (one row per pair and dimension), of which summary.py makes numbers with intervals

Weights carry no noise (weighting "mean"), so an evaluation is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.real_logits import check_real_logits
from amopo_fast.models.scoring import check_lengths, score
from amopo_fast.packing.plan import build_plan
from amopo_fast.packing.schedule import PairSizes, best_fit
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.objective import AMoPO, Batch, Objective

PROBABILITY_BINS = 20


@dataclass(frozen=True)
class Scores:
    """What a model says of P pairs in K dimensions."""

    dimensions: tuple[str, ...]
    records: np.ndarray  # (P,) int64
    table: np.ndarray  # (P, K, len(objective.columns)) float64, NaN where a dimension is absent
    lengths: np.ndarray  # (P, 2) int64, label tokens of the chosen and the rejected response
    probabilities: np.ndarray  # (K, 2, PROBABILITY_BINS) int64, response tokens by probability, chosen and rejected
    objective: Objective
    layout: str  # in a line
    logp_sums: np.ndarray  # (P, K, 2) float64, sums of the label log-probs, chosen and rejected; 0 where absent
    score_gaps: np.ndarray  # (P, K) float64, chosen minus rejected, NaN where there are no scores
    prompts: np.ndarray  # (P,) int64, equal for pairs of one prompt

    def column(self, name: str) -> np.ndarray:
        """(P, K) of one of the objective's columns."""
        return self.table[..., self.objective.columns.index(name)]


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    pairs: Sequence[PairTokens],
    *,
    dimensions: Sequence[str],
    objective: Objective | None = None,
    tokens_per_row: int = 8192,
    layout: str = "auto",
    attention_backend: str = "auto",
    kernel_backend: str = "auto",
) -> Scores:
    """Scores pairs with a causal LM on its own device, several pairs in a packed row.

    Args:
        objective: its form for evaluation is computed; default: AMoPO with the published hyper-parameters.
        tokens_per_row: computed tokens of a call, at most; a longer pair has a call to itself.
        layout: "auto", "shared" or "separate" (`models.check.choose_layout`).

    Raises:
        ValueError: no pairs, or a model that cannot be scored in that layout.
    """
    if not len(pairs):
        raise ValueError("there are no pairs to evaluate")
    objective = (objective or AMoPO()).for_evaluation()
    prepare_model(model, layout)
    check_lengths(model, pairs)
    check_real_logits(model, pairs[0])
    choice = choice_of(model)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sizes = PairSizes.of(pairs, choice.layout)
    rows = best_fit(range(len(pairs)), sizes, tokens_per_row)
    order = [index for row in rows for index in row]
    tables, sums, score_gaps, facts = [], [], [], []  # of the pairs in `order`
    probabilities = np.zeros((len(dimensions), 2, PROBABILITY_BINS), dtype=np.int64)
    try:
        for row in rows:
            here = [pairs[index] for index in row]
            plan = build_plan(here, choice.layout).to(device)
            stats = score(model, plan, attention_backend=attention_backend, backend=kernel_backend)
            gaps = np.stack([pair.gaps() for pair in here])
            facts += [(pair.record, len(pair.chosen), len(pair.rejected), pair.prompt_id) for pair in here]
            score_gaps.append(gaps)
            batch = Batch(len(dimensions), score_gaps=torch.from_numpy(gaps).to(device))
            tables.append(objective(stats, batch).table().double().cpu().numpy())
            sums.append(stats.logp_sum.double().view(-1, len(dimensions), 2).cpu().numpy())
            probabilities += _histogram(stats, len(dimensions))
    finally:
        model.train(was_training)
    back = np.argsort(order)
    records, chosen, rejected, prompts = np.array(facts, dtype=np.int64)[back].T
    return Scores(
        tuple(dimensions), records, np.concatenate(tables)[back], np.stack([chosen, rejected], 1), probabilities,
        objective, choice.describe(sizes.share), np.concatenate(sums)[back],
        score_gaps=np.concatenate(score_gaps)[back], prompts=prompts,
    )  # fmt: skip


def per_pair(scores: Scores) -> Iterator[dict[str, Any]]:
    """A pair's numbers, ready for JSON: of each dimension that it has, sums of label log-probs (nats) and label tokens
    of both sides, margin and weight."""
    margin, weight = scores.column("margin"), scores.column("weight")
    for p, record in enumerate(scores.records):
        dimensions = {}
        for k, name in enumerate(scores.dimensions):
            if np.isnan(margin[p, k]):
                continue
            chosen, rejected = map(float, scores.logp_sums[p, k])
            chosen_tokens, rejected_tokens = map(int, scores.lengths[p])
            dimensions[name] = {
                "chosen_logp": chosen,
                "rejected_logp": rejected,
                "chosen_tokens": chosen_tokens,
                "rejected_tokens": rejected_tokens,
                "margin": float(margin[p, k]),
                "weight": float(weight[p, k]),
            }
        yield {"record": int(record), "dimensions": dimensions}


def _histogram(stats, num_dimensions: int) -> np.ndarray:
    probability = stats.logps.float().exp().cpu().numpy()
    lengths = stats.length.cpu().numpy()
    # Sequences are ordered by pair, dimension, side.
    group = np.repeat(np.arange(len(lengths)) % (2 * num_dimensions), lengths)
    bins = np.minimum((probability * PROBABILITY_BINS).astype(np.int64), PROBABILITY_BINS - 1)
    counts = np.bincount(group * PROBABILITY_BINS + bins, minlength=2 * num_dimensions * PROBABILITY_BINS)
    return counts.reshape(num_dimensions, 2, PROBABILITY_BINS)

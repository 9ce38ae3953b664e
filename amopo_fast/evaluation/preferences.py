"""What a model prefers: accuracy, margin, weights and token probabilities per dimension, without a trainer.

    model, pairs -> Scores (one row per pair and dimension) -> summary (numbers with intervals)

Weights carry no noise (weighting "mean"), so an evaluation is the same every time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from amopo_fast.models.check import prepare_model
from amopo_fast.models.choice import choice_of
from amopo_fast.models.scoring import check_lengths, score
from amopo_fast.packing.plan import build_plan
from amopo_fast.packing.schedule import PairSizes, best_fit
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.objective import AMoPO, Batch, Objective

Z95 = 1.959963984540054  # of a standard normal, 95 % two-sided
PROBABILITY_BINS = 20
WEIGHT_BINS = 25
LENGTH_GROUPS = 5
PERCENTILES = (5, 25, 50, 75, 95)


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
    check_lengths(model, pairs)
    prepare_model(model, layout)
    choice = choice_of(model)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sizes = PairSizes.of(pairs, choice.layout)
    rows = best_fit(range(len(pairs)), sizes, tokens_per_row)
    order = [index for row in rows for index in row]
    tables, sums = [], []
    probabilities = np.zeros((len(dimensions), 2, PROBABILITY_BINS), dtype=np.int64)
    try:
        for row in rows:
            plan = build_plan([pairs[index] for index in row], choice.layout).to(device)
            stats = score(model, plan, attention_backend=attention_backend, backend=kernel_backend)
            tables.append(objective(stats, Batch(len(dimensions))).table().double().cpu().numpy())
            sums.append(stats.logp_sum.double().view(-1, len(dimensions), 2).cpu().numpy())
            probabilities += _histogram(stats, len(dimensions))
    finally:
        model.train(was_training)
    table = np.concatenate(tables)[np.argsort(order)]
    records = np.array([pair.record for pair in pairs])
    lengths = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    return Scores(
        tuple(dimensions), records, table, lengths, probabilities, objective, choice.describe(sizes.share),
        np.concatenate(sums)[np.argsort(order)],
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


def wilson(successes: float, count: int) -> dict[str, float]:
    """{"value", "low", "high"}: a share with its 95 % interval (Wilson 1927), which stays inside 0..1.

    Successes may be fractions (a pair right in some of its dimensions): then the interval is rather too wide.
    """
    if not count:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    share = successes / count
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    # At 0 and 1 the bound equals the share; rounding would put it on the share's other side.
    return {"value": share, "low": min(max(center - half, 0.0), share), "high": max(min(center + half, 1.0), share)}


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"}: the mean of independent values with its 95 % interval; NaN values do not count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    mean = float(values.mean())
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": mean, "low": mean - half, "high": mean + half}


def summary(scores: Scores) -> dict[str, Any]:
    """Numbers of an evaluation, ready for JSON. Intervals are 95 % and take pairs as independent.

    Keys: pairs; mean (accuracy and margin, averaged over a pair's dimensions first); dimensions (each with pairs,
    accuracy, margin, weight, logp and prob by side); by_length (accuracy by the difference of the responses' tokens);
    agreement (of the dimensions' signs, and correlation of their margins); probabilities (of response tokens).
    """
    accuracy, margin, weight = (scores.column(name) for name in ("accuracy", "margin", "weight"))
    present = ~np.isnan(accuracy)
    with np.errstate(invalid="ignore"):
        per_pair = {n: np.nansum(v, 1) / present.sum(1) for n, v in (("accuracy", accuracy), ("margin", margin))}
    result: dict[str, Any] = {
        "pairs": len(scores.records),
        **dataclasses.asdict(scores.objective),
        "mean": {
            "accuracy": wilson(float(np.nansum(per_pair["accuracy"])), int(present.any(1).sum())),
            "margin": mean_interval(per_pair["margin"]),
        },
        "dimensions": {},
        "by_length": _by_length(scores, per_pair["accuracy"]),
        "agreement": _agreement(scores),
        "probabilities": {"edges": np.linspace(0, 1, PROBABILITY_BINS + 1).round(4).tolist()},
    }
    edges = np.linspace(math.floor(100 * np.nanmin(weight)) / 100, math.ceil(100 * np.nanmax(weight)) / 100 + 1e-9,
                        WEIGHT_BINS + 1)  # fmt: skip
    for k, name in enumerate(scores.dimensions):
        here = present[:, k]
        known = weight[here, k]
        result["dimensions"][name] = {
            "pairs": int(here.sum()),
            "accuracy": wilson(float(np.nansum(accuracy[:, k])), int(here.sum())),
            "margin": mean_interval(margin[:, k]),
            "weight": {
                "mean": float(known.mean()) if len(known) else math.nan,
                "percentiles": {str(q): float(np.percentile(known, q)) for q in PERCENTILES} if len(known) else {},
                "edges": edges.round(4).tolist(),
                "counts": np.histogram(known, edges)[0].tolist(),
            },
            **{
                column: mean_interval(scores.column(column)[:, k])["value"]
                for column in ("logp_chosen", "logp_rejected", "prob_mean_chosen", "prob_mean_rejected")
            },
        }
        result["probabilities"][name] = {
            "chosen": scores.probabilities[k, 0].tolist(),
            "rejected": scores.probabilities[k, 1].tolist(),
        }
    return result


def _by_length(scores: Scores, accuracy: np.ndarray) -> list[dict[str, Any]]:
    """Groups of pairs with about equal numbers, by chosen minus rejected tokens; equal differences stay together."""
    difference = scores.lengths[:, 0] - scores.lengths[:, 1]
    cuts = np.unique(np.quantile(difference, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:-1], method="higher"))
    group = np.searchsorted(cuts, difference, side="right")
    groups = []
    for index in np.unique(group):
        here = group == index
        groups.append(
            {
                "from": int(difference[here].min()),
                "to": int(difference[here].max()),
                "pairs": int(here.sum()),
                "accuracy": wilson(float(np.nansum(accuracy[here])), int(here.sum())),
            }
        )
    return groups


def _agreement(scores: Scores) -> dict[str, Any]:
    """K x K: share of pairs in which two dimensions prefer the same side, and correlation of their margins."""
    accuracy, margin = scores.column("accuracy"), scores.column("margin")
    count = len(scores.dimensions)
    signs = np.full((count, count), math.nan)
    correlation = np.full((count, count), math.nan)
    for i in range(count):
        for j in range(count):
            both = ~np.isnan(accuracy[:, i]) & ~np.isnan(accuracy[:, j])
            if both.any():
                signs[i, j] = float((accuracy[both, i] == accuracy[both, j]).mean())
            if both.sum() > 1 and margin[both, i].std() > 0 and margin[both, j].std() > 0:
                correlation[i, j] = float(np.corrcoef(margin[both, i], margin[both, j])[0, 1])
    return {
        "dimensions": list(scores.dimensions),
        "same_side": signs.tolist(),
        "margin_correlation": correlation.tolist(),
    }


def difference(first: Scores, second: Scores) -> dict[str, dict[str, float]]:
    """second - first, paired by record: mean accuracy and, by dimension, accuracy, each with its 95 % interval.

    Raises ValueError where the two are not of the same pairs and dimensions.
    """
    if first.dimensions != second.dimensions or not np.array_equal(first.records, second.records):
        raise ValueError("evaluations of different pairs or dimensions cannot be compared")
    change = second.column("accuracy") - first.column("accuracy")
    with np.errstate(invalid="ignore"):
        mean = np.nansum(change, 1) / (~np.isnan(change)).sum(1)
    by_name = {name: mean_interval(change[:, k]) for k, name in enumerate(first.dimensions)}
    return {"mean": mean_interval(mean), **by_name}

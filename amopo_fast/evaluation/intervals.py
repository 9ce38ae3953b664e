"""Means, shares and rank correlations with 95 % intervals of samples that come in clusters, such as pairs of a prompt.

The bootstrap draws whole clusters with replacement (Field and Welsh 2007, "randomized cluster bootstrap") and takes the
2.5th and 97.5th percentile; the draws are the same in every run.
"""

from __future__ import annotations

import math

import numpy as np

from amopo_fast.report.marks import FEWEST_FOR_INTERVAL

Interval = dict[str, float | None]  # "value", "low", "high"; None where it is not known

Z95 = 1.959963984540054  # of a standard normal, 95 % two-sided
_DRAWS = 1000
_FEWEST_DRAWS = 200
_MOST_NUMBERS = 20_000_000  # of all draws together


def unknown() -> Interval:
    return {"value": None, "low": None, "high": None}


class Clusters:
    """What is drawn again: the clusters of N samples, by their number."""

    def __init__(self, cluster_of: np.ndarray):
        """cluster_of: (N,), equal for samples of one cluster."""
        _, self._cluster = np.unique(cluster_of, return_inverse=True)
        self.count = int(self._cluster.max()) + 1
        draws = int(min(_DRAWS, max(_FEWEST_DRAWS, _MOST_NUMBERS // self.count)))
        drawn = np.random.default_rng(0).integers(0, self.count, (draws, self.count))
        # (draws, clusters): how often a draw holds a cluster
        self._times = np.stack([np.bincount(row, minlength=self.count) for row in drawn]).astype(np.float32)

    def mean(self, values: np.ndarray) -> Interval:
        """Of (N,) values; NaN does not count. The bounds are None below FEWEST_FOR_INTERVAL values."""
        known = ~np.isnan(values)
        if not known.any():
            return unknown()
        sums = np.bincount(self._cluster[known], values[known], self.count)
        counts = np.bincount(self._cluster[known], minlength=self.count)
        with np.errstate(invalid="ignore"):  # a draw without any known value
            means = (self._times @ sums) / (self._times @ counts)
        return _interval(float(values[known].mean()), means, int(known.sum()))

    def share(self, right: np.ndarray) -> Interval:
        """Of (N,) values from 0 to 1; NaN does not count. Where all are alike no draw differs: then the interval is
        Wilson's of the clusters."""
        known = ~np.isnan(right)
        result = self.mean(right)
        if result["low"] is not None and result["value"] in (0.0, 1.0):
            clusters = len(np.unique(self._cluster[known]))
            result = wilson(result["value"] * clusters, clusters)
        return result

    def rank_correlation(self, x: np.ndarray, y: np.ndarray) -> Interval:
        """Spearman's, of (N,) values; a pair with a NaN does not count. None where one of both never varies."""
        known = ~np.isnan(x) & ~np.isnan(y)
        first, second = _Ranked(x[known]), _Ranked(y[known])
        value = _correlation(first, second, np.ones(int(known.sum())))
        if math.isnan(value):
            return unknown()
        own = self._cluster[known]
        drawn = [_correlation(first, second, times[own].astype(np.float64)) for times in self._times]
        return _interval(value, np.array(drawn), int(known.sum()))


def _interval(value: float, drawn: np.ndarray, samples: int) -> Interval:
    if samples < FEWEST_FOR_INTERVAL:
        return {"value": value, "low": None, "high": None}
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


class _Ranked:
    """Values by rank, ties together, so that a draw is ranked again without sorting it again."""

    def __init__(self, values: np.ndarray):
        self._order = np.argsort(values, kind="stable")
        _, self._starts, self._sizes = np.unique(values[self._order], return_index=True, return_counts=True)

    def ranks(self, times: np.ndarray) -> np.ndarray:
        """(N,) mean ranks of the values where each is there `times` times."""
        if not len(self._order):
            return np.zeros(0)
        groups = np.add.reduceat(times[self._order], self._starts)
        result = np.empty(len(times))
        result[self._order] = np.repeat(np.cumsum(groups) - groups / 2, self._sizes)
        return result


def _correlation(x: _Ranked, y: _Ranked, times: np.ndarray) -> float:
    """Pearson's, of the ranks; NaN where one of both does not vary."""
    total = times.sum()
    if not total:
        return math.nan
    ranks = [each.ranks(times) for each in (x, y)]
    a, b = (each - (times * each).sum() / total for each in ranks)
    scale = math.sqrt((times * a * a).sum() * (times * b * b).sum())
    return float((times * a * b).sum() / scale) if scale > 0 else math.nan


def wilson(successes: float, count: int) -> Interval:
    """A share with its 95 % interval (Wilson 1927), which stays inside 0..1."""
    if not count:
        return unknown()
    share = successes / count
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    # At 0 and 1 the bound equals the share; rounding would put it on the share's other side.
    return {"value": share, "low": min(max(center - half, 0.0), share), "high": max(min(center + half, 1.0), share)}

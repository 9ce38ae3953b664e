"""Intervals of clustered samples: what they promise, and ranks against a count of every two values."""

import numpy as np
import pytest

from amopo_fast.evaluation.intervals import Clusters, _correlation, _Ranked, unknown, wilson


def test_wilson():
    # Published worked example: 81 of 263 is 0.308 with 0.2553 to 0.3662 (Newcombe 1998, method 3).
    interval = wilson(81, 263)
    assert (round(interval["low"], 4), round(interval["high"], 4)) == (0.2553, 0.3662)
    assert wilson(0, 5)["low"] == 0 and wilson(5, 5)["high"] == 1 and wilson(0, 0) == unknown()


def test_an_interval_of_clusters_holds_the_mean():
    rng = np.random.default_rng(0)
    hits, alone = [], []
    for _ in range(300):
        sizes = rng.integers(1, 6, 60)
        cluster = np.repeat(np.arange(60), sizes)
        values = 0.3 + rng.normal(size=60)[cluster] + 0.3 * rng.normal(size=len(cluster))
        values[rng.random(len(values)) < 0.1] = np.nan
        for found, of in ((hits, cluster), (alone, np.arange(len(cluster)))):
            interval = Clusters(of).mean(values)
            found.append(interval["low"] <= 0.3 <= interval["high"])
    assert 0.9 < np.mean(hits) < 0.98
    assert np.mean(alone) < 0.87  # as if pairs of a prompt were independent


def test_few_values_have_no_interval_and_none_no_value():
    clusters = Clusters(np.arange(12))
    values = np.array([np.nan] * 3 + [1.0, 0.0] * 4 + [1.0])
    assert clusters.mean(values) == {"value": 5 / 9, "low": None, "high": None}
    values[0] = 0.0
    assert clusters.mean(values)["low"] < 0.5 < clusters.mean(values)["high"]
    assert clusters.mean(np.full(12, np.nan)) == unknown()


def test_a_share_of_all_or_nothing_has_the_width_of_its_clusters():
    cluster = np.repeat(np.arange(12), 4)
    assert Clusters(cluster).share(np.ones(48)) == wilson(12, 12)
    assert Clusters(cluster).share(np.zeros(48)) == wilson(0, 12)


def brute_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_rank_correlation_of_a_draw_is_that_of_the_repeated_values():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 8, 40).astype(float), rng.normal(size=40)
    y += 0.4 * x
    times = rng.integers(0, 4, 40)
    expected = np.corrcoef(brute_ranks(np.repeat(x, times)), brute_ranks(np.repeat(y, times)))[0, 1]
    assert _correlation(_Ranked(x), _Ranked(y), times.astype(float)) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_with_its_interval():
    rng = np.random.default_rng(2)
    x = rng.normal(size=200)
    y = np.exp(x) + 0.1 * rng.normal(size=200)
    x[:5] = np.nan
    found = Clusters(np.arange(200) // 2).rank_correlation(x, y)
    expected = np.corrcoef(brute_ranks(x[5:]), brute_ranks(y[5:]))[0, 1]
    assert found["value"] == pytest.approx(expected) and 0.9 < found["low"] < expected < found["high"] <= 1
    assert Clusters(np.arange(200)).rank_correlation(x, np.zeros(200)) == unknown()

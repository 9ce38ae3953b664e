"""Noisy lines as a person can read them: smoothed, and with no more points than a picture shows."""

from __future__ import annotations

import numpy as np

Points = list[tuple[float, float]]  # (optimizer step, value)

FEWEST_SMOOTHED = 30  # lines; of fewer each is shown as it is
MOST_POINTS = 600  # of a line in a picture of a few hundred pixels


def window(count: int) -> int:
    """Logged lines in the middle half of the smoothing window of a series of `count`: 1/30 of it."""
    return max(1, round(count / 30))


def smoothed(points: Points) -> Points:
    """A mean with Gaussian weights around every point, so that turns stay where they are; `window` is its width.

    A series of fewer than FEWEST_SMOOTHED points comes back as it is.
    """
    if len(points) < FEWEST_SMOOTHED:
        return points
    sigma = window(len(points)) / 1.349  # the middle half of a normal distribution is 1.349 sigma wide
    reach = min(int(4 * sigma) + 1, (len(points) - 1) // 2)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    values = np.array([value for _, value in points], dtype=np.float64)
    # At the ends a part of the window is outside: `inside` is the sum of the other weights.
    sums = np.concatenate([[0.0], weights.cumsum()])
    place = np.arange(len(values))
    inside = sums[np.minimum(len(values) - place + reach, len(weights))] - sums[np.maximum(reach - place, 0)]
    mean = np.convolve(values, weights, "same") / inside
    return [(step, float(value)) for (step, _), value in zip(points, mean, strict=True)]


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points (at least 4): the first, the last, and of every stretch between the lowest and the highest,
    so that no spike is lost."""
    if len(points) <= most:
        return points
    values = np.array([value for _, value in points])
    cuts = np.linspace(1, len(points) - 1, (most - 2) // 2 + 1).round().astype(int)
    kept = {0, len(points) - 1}
    for begin, end in zip(cuts, cuts[1:], strict=False):
        kept |= {begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())}
    return [points[index] for index in sorted(kept)]

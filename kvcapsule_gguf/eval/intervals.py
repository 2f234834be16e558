"""Confidence intervals at 95 %."""

from __future__ import annotations

from math import sqrt

import numpy as np

Z = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Of a share: hits of n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z
    centre, spread = p + z2 / (2 * n), Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def bootstrap(values: np.ndarray, groups: np.ndarray, over: np.ndarray | None = None, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Of the mean of `values`, or of its ratio to the mean of `over`, resampling whole groups (the questions on one picture are not independent)."""
    _, index = np.unique(groups, return_inverse=True)
    n = int(index.max()) + 1
    sums, below = np.bincount(index, values, n), np.bincount(index, over, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    means = (weights @ sums) / (weights @ below)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

"""The guard score of a block: how much worse than rotated q4_0 its worst token is.

score = max over K and V, over tokens, of err(x_hat) / err(q4_0(x)); both errors are summed over heads and channels, those of keys weighted by the
second moment of real text queries. 1 means "as good as q4_0". A token that is nearly nothing, or that q4_0 happens to hit, is no measure: err(q4_0(x))
counts as at least a thousandth of the mean energy of the block's tokens (q4_0's usual error is eight times that). A block keeps an economy tier if, in every layer, score <= kappa or kappa <= 0.
Head sizes that q4_0 does not fit have no rival: score 0.
"""

from __future__ import annotations

import numpy as np

from .rows import round_trip
from .types import Q4_0, row_counts

LEAST = np.float32(1e-20)
FLOOR = np.float32(1e-3)


def token_ratio(x: np.ndarray, x_hat: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """x, x_hat f32 [..., H, N, d], weight f32 [H, d] -> f32 [..., N]: err(x_hat) / err(q4_0(x)) of every token."""
    n, d = x.shape[-2:]
    if not Q4_0.fits(d):
        return np.zeros((*x.shape[:-3], n), np.float32)
    rival = round_trip(x, row_counts(q4_0=n))
    floor = FLOOR * _error(x, np.zeros_like(x), weight).mean(-1, keepdims=True)
    return _error(x, x_hat, weight) / np.maximum(_error(x, rival, weight), np.maximum(floor, LEAST))


def block_score(k: np.ndarray, v: np.ndarray, k_hat: np.ndarray, v_hat: np.ndarray, query_weight: np.ndarray) -> np.ndarray:
    """f32 [...]: the score of every block of one layer."""
    return np.maximum(token_ratio(k, k_hat, query_weight).max(-1), token_ratio(v, v_hat).max(-1))


def _error(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    e = np.square(y - x)
    if weight is not None:
        e *= weight[:, None]
    return e.sum((-3, -1))

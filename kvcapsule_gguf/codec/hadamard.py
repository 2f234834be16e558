"""The rotation of quantized rows: the normalised Hadamard matrix of the largest power of two that divides d, run by run."""

from __future__ import annotations

import numpy as np


def hadamard_size(d: int) -> int:
    """The largest power of two that divides d: 128 -> 128, 96 -> 32, 80 -> 16."""
    if d < 1:
        raise ValueError(f"head size {d}")
    return d & -d


def hadamard(x: np.ndarray) -> np.ndarray:
    """f32 [..., d] -> f32 [..., d]; symmetric and orthonormal, hence its own inverse.

    Sylvester order, the butterflies in the order of the C++ (stride 1, 2, 4, ..., then the scale), so that the two agree bit for bit.
    """
    d = x.shape[-1]
    n = hadamard_size(d)
    y = np.array(x, dtype=np.float32).reshape(-1, n)
    h = 1
    while h < n:
        pairs = y.reshape(-1, n // (2 * h), 2, h)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0] = a + b
        pairs[:, :, 1] = a - b
        h *= 2
    y *= np.float32(1) / np.sqrt(np.float32(n))
    return y.reshape(x.shape)

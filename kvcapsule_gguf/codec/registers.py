"""The Hadamard transform between the registers of a block: it spreads a loud channel over 2 or 4 values, with additions only and no shuffles."""

from __future__ import annotations

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """f32 [..., 2, lanes] or [..., 4, lanes] -> the same shape; symmetric and orthonormal, so its own inverse.

    The two registers of a row first, then the two rows, then one multiplication; the order of the additions is part of the format.
    """
    n = x.shape[-2]
    a, b = x[..., 0::2, :], x[..., 1::2, :]
    y = np.empty_like(x)
    y[..., 0::2, :], y[..., 1::2, :] = a + b, a - b
    if n == 4:
        top, low = y[..., :2, :].copy(), y[..., 2:, :].copy()
        y[..., :2, :], y[..., 2:, :] = top + low, top - low
        return y * np.float32(0.5)
    return y * np.float32(0.5**0.5)

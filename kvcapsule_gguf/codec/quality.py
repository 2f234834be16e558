"""The score of a tile in a tier; compression takes the smallest tier whose score is at most Q (`--quality`).

Errors are squared, summed over the heads, tokens and channels of a tile; one for the keys and one for the values of each layer. The transforms are
orthonormal, so they are measured on coefficients.
"""

from __future__ import annotations

import numpy as np

# a tile's error over the energy of a usual tile around the mean that counts as much as rotated q4_0's own error
LIMIT = 0.03
QUALITY = 1.0  # the default limit of a tile's score: an error as large as q4_0's
LEAST = 1e-20


def score(error: np.ndarray, rival: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """f64 [..., 2 L]: the errors of a tile, of rotated q4_0 on the same tile, and the energies of a usual tile -> f64 [...].

    The larger of the mean error over q4_0's, and of the mean error over the energy in units of LIMIT. The second one is for keys with large
    biases, where q4_0 itself fails and would allow anything. What is not a number gives no score below any limit.
    """
    by_rival = (error / np.maximum(rival, LEAST)).mean(-1)
    by_energy = (error / energy).mean(-1) / LIMIT
    return np.maximum(by_rival, by_energy)


def choose(scores: np.ndarray, limit: float) -> np.ndarray:
    """f64 [tiers, ...], from the smallest tier -> int [...]: the first with a score of at most `limit`, else -1: the tile stays as it is."""
    fits = scores <= limit
    return np.where(fits.any(0), fits.argmax(0), -1)

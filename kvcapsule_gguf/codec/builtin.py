"""Tables for any model, from nothing but its head size: what is used where there is no capsule file.

The mean is zero and there are no axes of channels; all layers, heads and groups share one table of keys and one of values. They come from the spectrum of
a usual tile, which three models agree on (docs/results/format-study-*.md), and from the error that each number of bits leaves. Keys have a bit more than values.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .allocate import allocate
from .head import F16

SMALLER = (6.25, 5.5, 4.75, 4, 3.25, 2.5, 1.95)  # of its tiers, by quality
MORE = 0.5  # bits that keys have above the mean, and values below it
# log2 of the energy of each block of rows over a usual row's, the constant row (which holds the mean) apart
SPECTRUM = (
    2.2, 0.7, 1.1, -0.3, -0.1, -1.3, -1.5, -0.6, -2.0, -1.9, -1.9, -2.5, -1.7, -2.4, -2.7, -2.9,
    -1.6, -2.6, -2.6, -3.4, -2.9, -2.1, -3.3, -2.9, -3.2, -3.2, -3.4, -3.7, -3.6, -3.7, -3.8, -4.0,
)  # fmt: skip
# what is left of the energy, by bits: measured on the three models' coefficients
LEFT = {0: 1.0, 1: 0.40, 2: 0.14, 3: 0.037, 4: 0.0094, 6: 0.0006, 8: 0.00005}


def builtin_bits(smaller: float, kind: str, more: float = MORE) -> float:
    """Bits for a key (kind "k") or a value ("v") of a tier."""
    return 16 / smaller + (more if kind == "k" else -more)


@lru_cache(maxsize=64)
def builtin_table(bits: float, groups: int) -> np.ndarray:
    """uint8 [33, groups] with at most `bits` for a value, scales included. The constant row is f16, so that a large mean or bias does no harm."""
    types = np.array(list(LEFT))
    values = np.array([64] * 31 + [32])
    energy = 2.0 ** np.array(SPECTRUM) * values / 64
    cost = np.where(types > 0, types * values[:, None] + 16, 0)
    pick = allocate(energy[:, None] * np.array(list(LEFT.values())), cost, bits * 64 * 32 - F16 * 32)
    return np.repeat(np.append(F16, types[pick])[:, None], groups, 1).astype(np.uint8)

"""Groups of channels: 32 channels in two registers of 16 lanes.

A group of keys holds 16 neighbouring RoPE pairs: the first members in one register, the second members in the other, so that a kernel turns a pair
without a shuffle. Channels without RoPE, and values, go into groups in their own order. The last group of either kind may be shorter.
"""

from __future__ import annotations

import numpy as np

from .rope import pair_index

LANES = 16


def plain_groups(d: int, first: int = 0) -> list[np.ndarray]:
    """int [2, lanes] channels of each group, of the channels first ... d - 1; an odd last channel has a -1 beside it."""
    out = []
    for start in range(first, d, 2 * LANES):
        channels = np.arange(start, min(d, start + 2 * LANES))
        if len(channels) % 2:
            channels = np.append(channels, -1)
        out.append(channels.reshape(2, -1))
    return out


def key_groups(d: int, rope_type: str, rotated: int) -> list[np.ndarray]:
    """The groups of keys whose first `rotated` channels have RoPE of this type (codec/rope.py)."""
    if rope_type in ("", "none"):
        rotated = 0
    pairs = pair_index(rope_type, rotated) if rotated else np.zeros((0, 2), np.int64)
    return [pairs[i : i + LANES].T for i in range(0, len(pairs), LANES)] + plain_groups(d, rotated)


def gather(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """f32 [..., d] -> f32 [..., 2, lanes]; zeros where there is no channel."""
    return np.where(group >= 0, rows[..., group], np.float32(0))


def scatter(rows: np.ndarray, group: np.ndarray, registers: np.ndarray) -> None:
    """The inverse of `gather`, into rows [..., d]."""
    real = group >= 0
    rows[..., group[real]] = registers[..., real]

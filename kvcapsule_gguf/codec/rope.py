"""RoPE for the reference, as ggml_rope_ext / ggml_rope_multi do it (ggml-cpu/ops.cpp); capsules store keys without it.

norm rotates the pairs (2i, 2i+1), the others (i, i + n/2), n = rotated dimensions. M-RoPE takes the position of pair i from one of four axes
(t, y, x, extra): in runs of `sections` pairs (mrope) or interleaved (imrope).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

INTERLEAVED, HALVES = "interleaved", "halves"


def pair_layout(rope_type: str) -> str:
    return INTERLEAVED if rope_type == "norm" else HALVES


def pair_index(rope_type: str, n: int) -> np.ndarray:
    """int [n / 2, 2]: the two channels of every frequency pair."""
    i = np.arange(n // 2)
    return np.stack([2 * i, 2 * i + 1], 1) if pair_layout(rope_type) == INTERLEAVED else np.stack([i, i + n // 2], 1)


def frequencies(n: int, freq_base: float, factors: np.ndarray | None = None) -> np.ndarray:
    """f64 [n / 2]: radians per position of every pair; `factors` is the model's rope_freqs.weight."""
    freq = np.float64(freq_base) ** (-2 * np.arange(n // 2) / n)
    return freq if factors is None else freq / factors


def axis_of_pair(rope_type: str, n: int, sections: Sequence[int]) -> np.ndarray:
    """int [n / 2]: the position axis (0 t, 1 y, 2 x, 3 extra) of every pair."""
    pairs = np.arange(n // 2)
    if rope_type not in ("mrope", "imrope"):
        return np.zeros_like(pairs)
    total = sum(sections)
    sector = pairs % total
    if rope_type == "mrope":
        return np.searchsorted(np.cumsum(sections), sector, side="right").clip(0, 3)
    axis = np.full_like(pairs, 3)
    for a in (2, 1, 0):  # ggml tests y, x, t in this order; they do not overlap (sector modulo 3)
        residue = {0: 0, 1: 1, 2: 2}[a]
        axis[(sector % 3 == residue) & (sector < 3 * sections[a])] = a
    return axis


def angles(
    positions: np.ndarray, rope_type: str, n: int, freq_base: float, sections: Sequence[int] = (0, 0, 0, 0), factors: np.ndarray | None = None
) -> np.ndarray:
    """f64 [T, n / 2]: by which every pair is rotated at positions int [T] (or [T, 4] for M-RoPE: t, y, x, extra)."""
    positions = np.asarray(positions)
    if positions.ndim == 1:
        positions = np.repeat(positions[:, None], 4, 1)
    return positions[:, axis_of_pair(rope_type, n, sections)] * frequencies(n, freq_base, factors)


def apply_rope(
    x: np.ndarray,
    positions: np.ndarray,
    *,
    rope_type: str,
    freq_base: float = 10000.0,
    n: int | None = None,
    sections: Sequence[int] = (0, 0, 0, 0),
    factors: np.ndarray | None = None,
    inverse: bool = False,
) -> np.ndarray:
    """f32 [..., T, d] with positions int [T] (or [T, 4] for M-RoPE: t, y, x, extra) -> f32 [..., T, d]; channels from n on are left alone."""
    x = np.asarray(x, dtype=np.float32)
    if rope_type == "none":
        return x.copy()
    n = x.shape[-1] if n is None else n
    angle = angles(positions, rope_type, n, freq_base, sections, factors)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    if inverse:
        sin = -sin
    first, second = pair_index(rope_type, n).T
    out = x.copy()
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def tie_pairs(x: np.ndarray, rope_type: str, n: int | None = None) -> np.ndarray:
    """Replaces both channels of a frequency pair by their mean, along the last axis; channels from n on, and `none`, are left alone."""
    out = np.array(x)
    if rope_type == "none":
        return out
    first, second = pair_index(rope_type, out.shape[-1] if n is None else n).T
    mean = (out[..., first] + out[..., second]) / 2
    out[..., first] = mean
    out[..., second] = mean
    return out

"""Sequence-level PCA: a basis over the tokens of a block, for a layer, shared by its blocks and heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 64  # blocks at once


@dataclass(frozen=True)
class Basis:
    mean: np.ndarray  # f32 [H, d]
    rows: np.ndarray  # f32 [N, N], orthonormal rows, energy descending
    energy: np.ndarray  # f64 [N]: mean over blocks of the (weighted) energy of each row, all heads


def fit_basis(blocks: np.ndarray, weight: np.ndarray | None = None, centre: bool = True) -> Basis:
    """blocks f32 [B, H, N, d]; weight [H, d] of the channels: the basis keeps what the queries look at."""
    n_blocks, heads, n, d = blocks.shape
    mean = blocks.mean((0, 2), dtype=np.float64) if centre else np.zeros((heads, d))
    scale = np.ones((heads, d)) if weight is None else np.sqrt(weight)
    moment = np.zeros((n, n))
    for i in range(0, n_blocks, _CHUNK):
        x = (blocks[i : i + _CHUNK] - mean[:, None]) * scale[:, None]
        x = x.transpose(2, 0, 1, 3).reshape(n, -1)
        moment += x @ x.T
    moment /= n_blocks
    energy, vectors = np.linalg.eigh(moment)
    rows = vectors.T[::-1]
    # the sign is free: the largest entry is positive, so that the same data give the same file
    rows = rows * np.sign(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1))
    return Basis(mean.astype(np.float32), np.ascontiguousarray(rows, np.float32), np.maximum(energy[::-1], 0))

"""Sequence-level PCA of a block: C_r = sum_t basis[r, t] (x[t] - mean), x_hat[t] = mean + sum_r basis[r, t] C_r."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import decode_rows, encode_rows
from .types import total_rows


def encode_pca(x: np.ndarray, mean: np.ndarray, basis: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """x f32 [..., H, N, d], mean f32 [H, d], basis f32 [N, N] (rows are unit vectors) -> uint8 [..., H, bytes]."""
    centred = x.astype(np.float32) - mean[:, None]
    return encode_rows(np.matmul(basis[: total_rows(counts)], centred), counts)


def decode_pca(data: np.ndarray, mean: np.ndarray, basis: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """uint8 [..., H, bytes] -> f32 [..., H, N, d]."""
    rows = decode_rows(data, counts, mean.shape[-1])
    return np.matmul(basis[: total_rows(counts)].T, rows) + mean[:, None]

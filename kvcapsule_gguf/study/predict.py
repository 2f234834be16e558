"""`pca` with a small MLP that predicts the dropped rows of the keys from the kept ones, channel by channel (study only: it earns nothing)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec.retain import gelu
from ..codec.rows import decode_rows
from ..codec.types import RowCounts, total_rows
from ..format.block import BlockCodec
from ..format.capsule import PCA
from ..train.fit_retain import RetainOptions, fit_mlp
from ..train.trainer import FittedLayer


@dataclass(frozen=True, kw_only=True)
class PredictedRows(BlockCodec):
    """up f32 [h, R], bias [h], down [N - R, h]: one for all channels and heads of the layer, as the basis is."""

    up: np.ndarray
    bias: np.ndarray
    down: np.ndarray

    def decode_keys(self, data: np.ndarray) -> np.ndarray:
        basis, kept = self.layer.k_basis, total_rows(self.key_rows)
        rows = decode_rows(data, self.key_rows, self.layer.key_length)
        hidden = np.matmul(self.up, rows) + self.bias[:, None]
        guess = np.matmul(self.down, gelu(hidden))
        return np.matmul(basis[:kept].T, rows) + np.matmul(basis[kept:].T, guess) + self.layer.k_mean[:, None]


def predicted(f: FittedLayer, keys: RowCounts, values: RowCounts, blocks: np.ndarray, h: int) -> PredictedRows:
    """blocks f32 [B, H, N, d]: the keys that were fitted to. Needs torch."""
    plain, kept = BlockCodec(f.layer, PCA, keys, values), total_rows(keys)
    x = decode_rows(plain.encode_keys(blocks), keys, f.layer.key_length)  # [B, H, R, d]
    y = np.matmul(f.layer.k_basis[kept:], blocks - f.layer.k_mean[:, None])

    def samples(rows: np.ndarray) -> np.ndarray:
        return np.moveaxis(rows, 2, 3).reshape(1, 1, -1, rows.shape[2]).astype(np.float32)

    up, bias, down = fit_mlp(samples(x), samples(y), np.ones((1, y.shape[2]), np.float32), h, RetainOptions(kept))
    return PredictedRows(f.layer, PCA, keys, values, up=up[0].astype(np.float32), bias=bias[0].astype(np.float32), down=down[0].astype(np.float32))

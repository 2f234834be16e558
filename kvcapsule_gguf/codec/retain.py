"""Keys as kept tokens, a prediction of the dropped ones from their kept neighbours, and residuals of the prediction.

Row i < m is kept token order[i] as it is; row i >= m is the residual of dropped token order[i] against what the *decoded* kept rows predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .rows import decode_rows, encode_rows, split_counts
from .types import rows_bytes, total_rows


@dataclass(frozen=True)
class Retain:
    """What a layer knows about its dropped keys; N tokens, m of them kept, K neighbours, MLP width h (arrays of zero size if h = 0)."""

    order: np.ndarray  # int [N]: the m kept tokens, most used first, then the dropped ones, most worth a residual first
    kept: int  # m
    neighbours: np.ndarray  # int [N-m, K]: row index (0..m-1) of each kept neighbour
    gate: np.ndarray  # f32 [H, N-m, K, d]
    mlp_up: np.ndarray  # f32 [H, h, K*d]
    mlp_up_bias: np.ndarray  # f32 [H, h]
    mlp_down: np.ndarray  # f32 [H, d, h]

    def predict(self, kept_rows: np.ndarray) -> np.ndarray:
        """f32 [..., H, m, d] -> f32 [..., H, N-m, d]: gates times neighbours, plus the key MLP."""
        x = kept_rows[..., self.neighbours, :]  # [..., H, N-m, K, d]
        out = (self.gate.astype(np.float32) * x).sum(-2)
        if self.mlp_up_bias.shape[-1]:
            flat = x.reshape(*x.shape[:-2], -1)
            up, down = self.mlp_up.astype(np.float32), self.mlp_down.astype(np.float32)
            hidden = gelu(np.matmul(flat, up.swapaxes(-1, -2)) + self.mlp_up_bias[:, None])
            out = out + np.matmul(hidden, down.swapaxes(-1, -2))
        return out.astype(np.float32)


def encode_retain(k: np.ndarray, layer: Retain, counts: Sequence[int]) -> np.ndarray:
    """k f32 [..., H, N, d] -> uint8 [..., H, bytes]; the rows are contiguous in the order of the types."""
    d, m, total = k.shape[-1], layer.kept, total_rows(counts)
    kept_counts, residual_counts = split_counts(counts, m)
    kept = encode_rows(k[..., layer.order[:m], :], kept_counts)
    predicted = layer.predict(decode_rows(kept, kept_counts, d))
    residual = k[..., layer.order[m:total], :] - predicted[..., : total - m, :]
    # kept and residual rows of the same type are neighbours in the list, so the two lists are one
    return np.concatenate([kept, encode_rows(residual, residual_counts)], -1)


def decode_retain(data: np.ndarray, layer: Retain, counts: Sequence[int]) -> np.ndarray:
    """uint8 [..., H, bytes] -> f32 [..., H, N, d]."""
    heads, d = layer.gate.shape[0], layer.gate.shape[-1]
    m = layer.kept
    assert data.shape[-1] == rows_bytes(counts, d) and data.shape[-2] == heads
    rows = decode_rows(data, counts, d)
    dropped = layer.predict(rows[..., :m, :])
    dropped[..., : rows.shape[-2] - m, :] += rows[..., m:, :]
    out = np.empty((*rows.shape[:-2], len(layer.order), d), dtype=np.float32)
    out[..., layer.order, :] = np.concatenate([rows[..., :m, :], dropped], -2)
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact one, x / 2 (1 + erf(x / sqrt 2)). numpy has no erf: Abramowitz and Stegun 7.1.26 is off by 1.5e-7, below f32's own noise here."""
    z = np.abs(np.asarray(x, dtype=np.float64)) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.copysign(1 - series * np.exp(-z * z), x)
    return (0.5 * x * (1 + erf)).astype(np.float32)

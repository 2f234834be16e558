"""What takes the place of the DCT in a whole tile of 8 x 8 tokens, if a file has it; shorter tiles keep the DCT (docs/reference/format-v2.md).

`Learned`: an orthonormal matrix over the tokens, as the paper's PCA of values along the sequence. `Retain`: the keys of some tokens as they
are, and for the others what is left after a prediction from kept neighbours, as the paper's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .channels import LANES

N = 64


@dataclass(frozen=True)
class Learned:
    """matrix f32 [64, 64]: rows are orthonormal, the loudest first."""

    matrix: np.ndarray

    def rows(self, x: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """f32 [..., 64, d] tokens without the mean -> rows, same shape. read: what is read back of rows (`Retain` asks for it)."""
        return self.matrix @ x

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        return self.matrix.T @ rows


@dataclass(frozen=True)
class Retain:
    """Of one head. Row i < m is the key of token order[i]; row m + j is what the prediction of token order[m + j] leaves, made from the *decoded* kept rows.

    order int [64]; near int [64 - m, K]: kept rows; gate f32 [64 - m, K, d]; the key MLP: up f32 [h, K * d], bias f32 [h], down f32 [d, h] (h may be 0).
    m is odd, so that no block has rows of both kinds.
    """

    order: np.ndarray
    near: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    down: np.ndarray

    @property
    def kept(self) -> int:
        return N - len(self.near)

    def predict(self, kept: np.ndarray) -> np.ndarray:
        """f32 [..., m or more, d] rows -> f32 [..., 64 - m, d]: gates times neighbours, plus the key MLP, down max(up x + bias, 0)."""
        x = kept[..., self.near, :]
        out = (self.gate * x).sum(-2)
        if len(self.bias):
            hidden = np.maximum(x.reshape(*x.shape[:-2], -1) @ self.up.T + self.bias, 0)
            out = out + hidden @ self.down.T
        return out.astype(np.float32)

    def rows(self, x: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        rows = x[..., self.order, :]
        rows[..., self.kept :, :] -= self.predict(read(rows))
        return rows

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty_like(rows)
        out[..., self.order[: self.kept], :] = rows[..., : self.kept, :]
        out[..., self.order[self.kept :], :] = rows[..., self.kept :, :] + self.predict(rows)
        return out


def gate_of_channels(gate: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """[..., 16 * groups]: a gate for both channels of a lane -> f32 [..., d]."""
    out = np.zeros((*gate.shape[:-1], max(int(g.max()) for g in groups) + 1), np.float32)
    for i, group in enumerate(groups):
        for channels in group:
            real = channels >= 0
            out[..., channels[real]] = gate[..., LANES * i : LANES * i + len(channels)][..., real]
    return out

"""The paper's own method, as rows of a table: whole images.

The paper keeps r of the n tokens' keys, the same ones in every image, and makes the others from them with a dense map for each head; values are r principal rows over the
n tokens, for each head. All of it is in f16, and the keys are those of the cache, with RoPE. How it trains its mask is not published: here the tokens are
taken one after the other, each the one that leaves the least energy that the taken ones do not explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..codec.rope import apply_rope
from ..format.base_model import BaseModel
from ..train.source import KVSample
from .measure import RoundTrip, rope_of

RIDGE = 1e-2
# pictures -> how many times smaller they are, and what is read back
Make = Callable[[Sequence[KVSample]], tuple[float, RoundTrip]]


def rows(model: BaseModel, fitted: Sequence[KVSample]) -> Iterator[tuple[str, Make]]:
    for share in (0.4, 0.2):
        yield f"paper-exact, {1 - share:.0%} removed", Whole(model, fitted, share)


class Whole:
    """r of n tokens of a whole image; the maps of keys theta [H, r, n] and the rows of values U [H, r, n] of each layer, in f16."""

    def __init__(self, model: BaseModel, fitted: Sequence[KVSample], share: float) -> None:
        self.model, self.n = model, len(fitted[0].keys[0])
        self.kept = max(1, round(share * self.n))
        self.layers = [self._fit(i, fitted) for i in range(len(model.kv_layers))]

    def turned(self, i: int, s: KVSample, k: np.ndarray, inverse: bool = False) -> np.ndarray:
        """Keys f32 [n, H, d] with RoPE, or from there back."""
        return apply_rope(k.swapaxes(0, 1), inverse=inverse, **rope_of(self.model, s, i)).swapaxes(0, 1)

    def _fit(self, i: int, fitted: Sequence[KVSample]) -> tuple[np.ndarray, ...]:
        k = np.stack([self.turned(i, s, s.keys[i]) for s in fitted]).transpose(2, 1, 0, 3).reshape(fitted[0].keys[i].shape[1], self.n, -1)  # [H, n, pictures * d]
        grams = (k @ k.swapaxes(1, 2)).astype(np.float64)
        mask = _taken(grams.sum(0), self.kept)
        inner = grams[:, mask[:, None], mask]
        inner = inner + RIDGE * np.trace(inner, axis1=1, axis2=2)[:, None, None] / len(mask) * np.eye(len(mask))
        theta = np.linalg.solve(inner, grams[:, mask]).astype(np.float16)
        v = np.stack([s.values[i] for s in fitted])  # [pictures, n, H, d]
        mean = v.mean((0, 1))
        y = (v - mean).transpose(2, 1, 0, 3).reshape(v.shape[2], self.n, -1)
        rows = np.linalg.eigh((y @ y.swapaxes(1, 2)).astype(np.float64))[1].swapaxes(1, 2)[:, ::-1][:, : self.kept]
        return mask, theta, rows.astype(np.float16), mean

    def __call__(self, samples: Sequence[KVSample]) -> tuple[float, RoundTrip]:
        read = {}
        for s in samples:
            for i, (mask, theta, rows, mean) in enumerate(self.layers):
                kept = self.turned(i, s, s.keys[i])[mask].astype(np.float16).astype(np.float32)
                keys = self.turned(i, s, np.einsum("hrn,rhd->nhd", theta.astype(np.float32), kept), inverse=True)
                u = rows.astype(np.float32)
                stored = np.einsum("hrn,nhd->hrd", u, s.values[i] - mean).astype(np.float16).astype(np.float32)
                read[id(s.keys[i])] = keys, np.einsum("hrn,hrd->nhd", u, stored) + mean
        return self.n / self.kept, lambda i, k, v: read[id(k)]


def _taken(gram: np.ndarray, count: int) -> np.ndarray:
    """f64 [n, n] -> int [count], sorted: a pivoted Cholesky factorization, of which the pivot is the token that takes most energy away."""
    left, taken = gram + 1e-9 * gram.trace() * np.eye(len(gram)), []
    for _ in range(count):
        gain = np.square(left).sum(0) / left.diagonal()
        gain[taken] = 0
        taken.append(int(gain.argmax()))
        at = left[taken[-1]]
        left -= np.outer(at, at) / at[taken[-1]]
        left[taken, taken] = 1
    return np.sort(np.array(taken))

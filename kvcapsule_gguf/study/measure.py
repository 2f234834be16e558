"""The error of attention over an image whose keys and values went through a codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..codec import quantize
from ..codec.rope import apply_rope
from ..format.base_model import BaseModel
from ..format.capsule import GRID_ROPE_TYPES
from ..train.source import KVSample

# number of the KV layer, K [n, H, d], V [n, H, d] -> K and V as they are read
RoundTrip = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def positions(model: BaseModel, sample: KVSample) -> np.ndarray:
    """int [n] of the image's tokens, or [n, 4] with M-RoPE."""
    at = np.arange(len(sample.keys[0]))
    if model.rope_type in GRID_ROPE_TYPES and sample.width:
        y, x = np.divmod(at, sample.width)
        at = np.stack([0 * y, y, x, 0 * y], 1)
    return sample.first_position + at


def rope_of(model: BaseModel, sample: KVSample, i: int) -> dict[str, object]:
    """How the image's keys of KV layer number i are turned: arguments of apply_rope."""
    layer = model.kv_layers[i]
    kind = model.rope_type if model.layer_rope[layer] else "none"
    return {"positions": positions(model, sample), "rope_type": kind, "freq_base": model.freq_base[layer], "n": model.rope_dimensions,
            "sections": model.rope_sections, "factors": model.freq_factors}


def attention(model: BaseModel, sample: KVSample, i: int, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Output [T, heads, d_v] of the sample's queries over the image's keys and values [n, H, d] of KV layer number i."""
    layer = model.kv_layers[i]
    k = apply_rope(k.swapaxes(0, 1), **rope_of(model, sample, i))  # [H, n, d]
    group = model.head_count[layer] // model.head_count_kv[layer]
    q = sample.queries[i].swapaxes(0, 1)  # [heads, T, d]
    score = np.matmul(q, np.repeat(k, group, 0).swapaxes(1, 2)) / np.sqrt(k.shape[-1])
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.matmul(p, np.repeat(v.swapaxes(0, 1), group, 0))


class Measure:
    """Squared error of the attention output relative to the output, mean over layers, in units of that of rotated q4_0; f16 is taken as exact."""

    def __init__(self, model: BaseModel, samples: Sequence[KVSample]) -> None:
        self.model, self.samples = model, samples
        self.layers = [i for i in range(len(model.kv_layers)) if len(samples[0].queries[i])]
        self.exact = {(n, i): attention(model, s, i, s.keys[i], s.values[i]) for n, s in enumerate(samples) for i in self.layers}
        self.unit = np.ones(3)
        self.unit = self(rotated("q4_0"))

    def __call__(self, way: RoundTrip) -> np.ndarray:
        """f64 [3]: K and V, K only, V only stored this way."""
        return self.by_layer(way).mean(0)

    def by_layer(self, way: RoundTrip) -> np.ndarray:
        """f64 [layers, 3]."""
        total = np.zeros((len(self.layers), 3))
        norm = np.zeros(len(self.layers))
        for n, s in enumerate(self.samples):
            for j, i in enumerate(self.layers):
                k, v = s.keys[i], s.values[i]
                k_hat, v_hat = way(i, k, v)
                exact = self.exact[n, i]
                norm[j] += np.square(exact).sum()
                for c, pair in enumerate(((k_hat, v_hat), (k_hat, v), (k, v_hat))):
                    total[j, c] += np.square(attention(self.model, s, i, *pair) - exact).sum()
        return total / norm[:, None] / self.unit


def rotated(name: str) -> RoundTrip:
    return lambda i, k, v: (quantize.rotated(k, name), quantize.rotated(v, name))


def with_outliers(samples: Sequence[KVSample], seed: int = 0, tokens: int = 3, times: float = 4.0) -> list[KVSample]:
    """The same with `tokens` tokens of each picture so many standard deviations away, at random places, in all layers."""
    out = []
    for number, s in enumerate(samples):
        rng = np.random.default_rng([seed, number, 8])
        at = rng.choice(len(s.keys[0]), tokens, replace=False)

        def wild(x: np.ndarray) -> np.ndarray:
            x = x.copy()
            x[at] += times * x.std((0, 1)) * rng.standard_normal(x[at].shape).astype(np.float32)
            return x

        out.append(replace(s, keys=[wild(k) for k in s.keys], values=[wild(v) for v in s.values]))
    return out

"""Keys, values and queries that resemble those of images: smooth over a grid, with a few loud channels, and noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcapsule_gguf.format.base_model import BaseModel, read_base_model
from kvcapsule_gguf.train.source import KVSample


@dataclass
class Source:
    model: BaseModel
    samples: list[KVSample]


def field(rng: np.random.Generator, side: int, channels: tuple[int, ...]) -> np.ndarray:
    """f32 [side * side, *channels]: a sum of smooth random waves plus a tenth of noise."""
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1) / side
    out = 0.1 * rng.standard_normal((side * side, *channels))
    for _ in range(6):
        fx, fy, phase = rng.uniform(0, 4, 2).tolist() + [rng.uniform(0, 6)]
        out += np.cos(2 * np.pi * (fx * x + fy * y) + phase).reshape(-1, *[1] * len(channels)) * rng.standard_normal(channels)
    return out.astype(np.float32)


def sample(model: BaseModel, seed: int, side: int = 16) -> KVSample:
    rng = np.random.default_rng([seed, 5])
    keys, values, queries = [], [], []
    for i in model.kv_layers:
        heads = model.head_count_kv[i]
        k = field(rng, side, (heads, model.key_length[i]))
        k[..., 3] = 3 * k[..., 3] + 8  # what the mean takes away
        keys.append(k)
        values.append(field(rng, side, (heads, model.value_length[i])))
        q = rng.standard_normal((20, model.head_count[i], model.key_length[i])).astype(np.float32)
        q[..., : model.key_length[i] // 4] *= 3
        queries.append(q)
    return KVSample(keys, values, queries, side, 0)


def source(model_gguf: Path, count: int = 8, side: int = 16) -> Source:
    model = read_base_model(model_gguf)
    return Source(model, [sample(model, i, side) for i in range(count)])

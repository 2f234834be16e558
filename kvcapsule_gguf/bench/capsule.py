"""Capsules with random contents at 5x, with the rows that training on the demo model chose there (docs/results/codec-study.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..codec.cut import BlockShape
from ..codec.types import RowCounts, row_counts
from ..format.base_model import read_base_model
from ..format.capsule import GRID_ROPE_TYPES, PCA, RETAIN, Capsule, Layer, Tier
from ..format.fingerprint import base_of
from ..format.writer import write_capsule
from ..train.pattern import kept_tokens, most_used_first, neighbours
from ..train.schedule import faithful_rows
from ..train.trainer import TrainOptions
from .settings import Setting

BLOCK = 64
KEPT = round(TrainOptions.kept * BLOCK)
VALUES = row_counts(q8_0=2, q4_0=15, q2_0=47)
PCA_KEYS = row_counts(q8_0=3, q4_0=25, q2_0=36)
RETAIN_KEYS = row_counts(q4_0=33, q2_0=31)


def make_capsule(model: Path, path: Path, setting: Setting, shape: BlockShape, side: int, kappa: Sequence[float] | None = None) -> Path:
    """shape: of BLOCK tokens; side: of the images, in tokens; kappa: of each layer, None: no guard."""
    base = read_base_model(model)
    retain = setting.capsule == "retain"
    layers = [_layer(base, i, setting, shape.tile_width or side) for i in base.kv_layers]

    def tier(name: str, keys: RowCounts, values: RowCounts, key_codec: int, kappa: Sequence[float] | None = None) -> Tier:
        n = len(layers)
        return Tier(name=name, key_codec=[key_codec] * n, key_rows=[keys] * n, value_rows=[values] * n, kappa=list(kappa or [0.0] * n))

    faithful = faithful_rows(BLOCK, layers[0].key_length)
    capsule = Capsule(
        base=base_of(base),
        block_size=BLOCK,
        block_shape=shape.kind,
        layers=layers,
        tiers=[tier("faithful", faithful, faithful, PCA), tier("economy", RETAIN_KEYS if retain else PCA_KEYS, VALUES, RETAIN if retain else PCA, kappa)],
        name=f"random {setting.capsule} capsule for {base.name}",
        block_width=shape.tile_width or side,
        image_tokens=0 if base.rope_type in GRID_ROPE_TYPES else side * side,
        neighbour_count=setting.neighbours if retain else 0,
    )
    capsule.set_ratios()
    capsule.default_ratio = capsule.tiers[1].ratio
    return write_capsule(path, capsule)


def _layer(base, i: int, setting: Setting, width: int) -> Layer:
    retain, k, h = setting.capsule == "retain", setting.neighbours, setting.mlp_width
    heads, d = base.head_count_kv[i], base.key_length[i]
    rng = np.random.default_rng(i)

    def basis() -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((BLOCK, BLOCK)))[0].astype(np.float32)

    layer = Layer(
        index=i,
        head_count_kv=heads,
        key_length=d,
        value_length=base.value_length[i],
        k_mean=rng.standard_normal((heads, d)).astype(np.float32),
        v_mean=rng.standard_normal((heads, base.value_length[i])).astype(np.float32),
        k_basis=basis(),
        v_basis=basis(),
        k_query_weight=np.ones((heads, d), np.float32),
        freq_base=base.freq_base[i],
        rope=base.layer_rope[i],
    )
    if retain:
        kept = kept_tokens(BLOCK, KEPT, width)
        dropped, nearest = neighbours(BLOCK, kept, k, width)
        kept, nearest = most_used_first(kept, nearest)
        layer.kept_count, layer.mlp_width = KEPT, h
        layer.token_order = np.concatenate([kept, dropped]).astype(np.uint16)
        layer.k_neighbours = nearest
        gate = rng.random((heads, BLOCK - KEPT, k, 1)) / k
        layer.k_gate = np.broadcast_to(gate, (heads, BLOCK - KEPT, k, d)).astype(np.float16)
    if retain and h:
        layer.k_mlp_up = (rng.standard_normal((heads, h, k * d)) / (k * d) ** 0.5).astype(np.float16)
        layer.k_mlp_up_bias = np.zeros((heads, h), np.float32)
        layer.k_mlp_down = (0.1 * rng.standard_normal((heads, d, h))).astype(np.float16)
    return layer

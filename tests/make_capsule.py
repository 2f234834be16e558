"""Capsules for tests: valid files for any base GGUF, with random contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvcapsule_gguf.codec.types import legal, row_counts
from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.capsule import CODEC_NAMES, PCA, Capsule, Layer, Tier
from kvcapsule_gguf.format.fingerprint import base_of
from kvcapsule_gguf.format.writer import write_capsule


def random_capsule(
    model_gguf: Path | str,
    path: Path | str,
    *,
    block_size: int = 16,
    lossless: bool = True,
    rows: Sequence[int] | int | None = None,
    value_rows: Sequence[int] | int | None = None,
    faithful_rows: Sequence[int] | int | None = None,
    key_codec: str = "pca",
    kept: int | None = None,
    neighbours: int = 2,
    mlp_width: int = 0,
    basis: str = "orthonormal",
    kappa: float = 0.0,
    image_tokens: int = 0,
    block_width: int = 0,
    tile_width: int = 0,
    seed: int = 1,
) -> Path:
    """Writes `path` and returns it.

    lossless: all rows of both tiers are f32, so that a block decodes to itself up to rounding; otherwise `faithful` is graded q8_0 and q4_0 and
    `economy` q8_0, q4_0 and q2_0 (types that do not fit the head size are moved up). `rows`, `value_rows` (default: the same) and
    `faithful_rows` replace them: counts in the order f32, f16, q8_0, q4_0, q2_0, or a number of f32 rows.
    key_codec "retain": `kept` tokens (default: every other), `neighbours`, an MLP of width `mlp_width`; if lossless in both tiers, else in economy.
    tile_width: blocks are tiles, so many tokens wide. basis: "orthonormal" (random) or "identity". kappa, of the economy tier: <= 0 turns the guard off.
    """
    base = read_base_model(model_gguf)
    rng = np.random.default_rng(seed)
    n = block_size
    m = 0 if key_codec == "pca" else (n + 1) // 2 if kept is None else kept
    codec = CODEC_NAMES[key_codec]
    layers = [_layer(base, i, n, m, neighbours, mlp_width if m else 0, basis, rng) for i in base.kv_layers]

    def tier(name: str, keys: Sequence[int] | int, values: Sequence[int] | int, codec: int, kappa: float) -> Tier:
        keys, values = (row_counts(f32=x) if isinstance(x, int) else x for x in (keys, values))
        return Tier(
            name=name,
            key_codec=[codec] * len(layers),
            key_rows=[legal(keys, x.key_length) for x in layers],
            value_rows=[legal(values, x.value_length) for x in layers],
            kappa=[kappa] * len(layers),
        )

    head = max(1, n // 12)
    faithful = n if lossless else row_counts(q8_0=head, q4_0=n - head)
    economy = n if lossless else row_counts(q8_0=head, q4_0=n // 4, q2_0=n - head - n // 4)
    faithful, economy = (given if given is not None else default for given, default in ((faithful_rows, faithful), (rows, economy)))
    tiers = [
        tier("faithful", faithful, faithful, codec if lossless else PCA, 0.0),
        tier("economy", economy, economy if value_rows is None else value_rows, codec, kappa),
    ]
    capsule = Capsule(
        base=base_of(base),
        block_size=n,
        layers=layers,
        tiers=tiers,
        name=f"random capsule for {base.name}",
        block_shape="tile" if tile_width else "raster",
        block_width=tile_width or block_width,
        image_tokens=image_tokens,
        neighbour_count=neighbours if m else 0,
        provenance={"tool": "tests/make_capsule.py", "seed": seed},
    )
    capsule.set_ratios()
    capsule.default_ratio = capsule.tiers[1].ratio
    return write_capsule(path, capsule)


def orthonormal(n: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "identity":
        return np.eye(n, dtype=np.float32)
    return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


def _layer(base, i: int, n: int, m: int, neighbours: int, h: int, basis: str, rng: np.random.Generator) -> Layer:
    heads, d_k, d_v = base.head_count_kv[i], base.key_length[i], base.value_length[i]
    f32, f16 = np.float32, np.float16
    weight = np.abs(1 + 0.5 * rng.standard_normal((heads, d_k)))
    layer = Layer(
        index=i,
        head_count_kv=heads,
        key_length=d_k,
        value_length=d_v,
        k_mean=(0.3 * rng.standard_normal((heads, d_k))).astype(f32),
        v_mean=(0.3 * rng.standard_normal((heads, d_v))).astype(f32),
        k_basis=orthonormal(n, basis, rng),
        v_basis=orthonormal(n, basis, rng),
        k_query_weight=(weight / weight.mean()).astype(f32),
        freq_base=base.freq_base[i],
        rope=base.layer_rope[i],
    )
    if m:
        layer.kept_count, layer.mlp_width = m, h
        order = rng.permutation(n)
        layer.token_order = np.concatenate([np.sort(order[:m]), order[m:]]).astype(np.uint16)
        layer.k_neighbours = rng.integers(0, m, (n - m, neighbours)).astype(np.int32)
        # equal within a frequency pair for every kind of RoPE: one number per neighbour and head
        gate = (rng.random((heads, n - m, neighbours, 1)) / neighbours).astype(f16)
        layer.k_gate = np.broadcast_to(gate, (heads, n - m, neighbours, d_k)).copy()
    if m and h:
        layer.k_mlp_up = (rng.standard_normal((heads, h, neighbours * d_k)) / np.sqrt(neighbours * d_k)).astype(f16)
        layer.k_mlp_up_bias = (0.1 * rng.standard_normal((heads, h))).astype(f32)
        layer.k_mlp_down = (0.2 * rng.standard_normal((heads, d_k, h))).astype(f16)
    return layer

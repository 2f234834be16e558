"""Capsules for tests: valid files for any base GGUF, with random contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from kvcapsule_gguf.codec.channels import key_groups, plain_groups
from kvcapsule_gguf.codec.head import F16, F32
from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.fingerprint import base_of
from kvcapsule_gguf.format.tile_capsule import ROWS, TileCapsule, TileLayer, write_tile_capsule

LOSSLESS = (F32,)
MIXED = (0, 1, 2, 3, 4, 6, 8, F16)


def exact_axes(d: int, rng: np.random.Generator) -> np.ndarray:
    """f16 [d, d], orthonormal without rounding: four channels are mixed at a time, or swapped if d is no multiple of four."""
    four = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    blocks = np.kron(np.eye(d // 4), four) if d % 4 == 0 else np.eye(d)
    return (rng.choice([-1, 1], d) * blocks[rng.permutation(d)][:, rng.permutation(d)]).astype(np.float16)


def random_transforms(codec: str, heads: int, d_k: int, groups: int, mlp: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of a layer that a codec has beside those of the DCT; groups: of keys; mlp: hidden units of its key MLP."""
    if codec == "dct":
        return {}
    out = {"v_transform": exact_axes(64, rng)}
    if codec == "learned":
        return out | {"k_transform": exact_axes(64, rng)}
    kept, near = int(rng.choice([21, 25, 33])), int(rng.integers(1, 5))
    lead = (heads, 64 - kept, near)
    out |= {"k_order": rng.permutation(64).astype(np.uint8), "k_near": rng.integers(0, kept, lead[1:]).astype(np.uint8)}
    out["k_gate"] = (rng.standard_normal((*lead, 16 * groups)) / near).astype(np.float16)
    if mlp:
        shapes = {"k_mlp_up": (heads, mlp, near * d_k), "k_mlp_bias": (heads, mlp), "k_mlp_down": (heads, d_k, mlp)}
        out |= {name: (0.1 * rng.standard_normal(shape)).astype(np.float32 if name == "k_mlp_bias" else np.float16) for name, shape in shapes.items()}
    return out


def random_capsule(model_gguf: Path | str, path: Path | str, *, tiers: Sequence[int | Sequence[int]] = LOSSLESS, axes: bool = True, energy: float = 1e6, seed: int = 1,
                   codec: str = "dct", mlp: int = 0, narrow: Sequence[Sequence[int]] = ()) -> Path:
    """Writes `path` and returns it. narrow: of each layer, 1 for each head that sees no other image (layers without one: []). tiers, from the smallest: the bits of all blocks, or those to draw the bits of each block from.

    codec: dct, learned or retain, with `mlp` hidden units. LOSSLESS decodes a tile to itself up to rounding. `energy` of a usual tile is so large that the second limit of the score never counts.
    """
    base, rng = read_base_model(model_gguf), np.random.default_rng(seed)

    def table(heads: int, groups: int) -> np.ndarray:
        return np.stack([rng.choice(np.atleast_1d(bits), (heads, ROWS, groups)) for bits in tiers]).astype(np.uint8)

    layers = []
    for i in base.kv_layers:
        heads, d_k, d_v = base.head_count_kv[i], base.key_length[i], base.value_length[i]
        groups = len(key_groups(d_k, base.rope_type if base.layer_rope[i] else "none", base.rope_dimensions)), len(plain_groups(d_v))
        means = [(0.3 * rng.standard_normal((heads, d))).astype(np.float32) for d in (d_k, d_v)]
        turn = np.stack([exact_axes(d_v, rng) for _ in range(heads)]) if axes else None
        named = np.array(narrow[len(layers)], np.uint8) if len(narrow) > len(layers) and len(narrow[len(layers)]) else None
        layers.append(TileLayer(i, base.layer_rope[i], *means, *(table(heads, g) for g in groups), energy, energy, turn, named,
                                **random_transforms(codec, heads, d_k, groups[0], mlp, rng)))
    name = f"random capsule for {base.name}"
    return write_tile_capsule(path, TileCapsule(base_of(base), base.rope_dimensions, [0.0] * len(tiers), layers, name, {"tool": "tests/make_capsule.py"}))


def old_capsule(path: Path) -> Path:
    """What a reader sees of a capsule of format v1 before it refuses it."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "kvcapsule")
    w.add_uint32("kvcapsule.version", 1)
    w.add_uint32("kvcapsule.block_size", 64)
    for write in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        write()
    return path

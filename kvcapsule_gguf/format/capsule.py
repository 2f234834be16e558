"""The contents of a capsule file as plain data; shapes are numpy's (reversed ggml `ne`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..codec.types import RowCounts, rows_bytes
from ..runtime.errors import CapsuleError

VERSION = 1
PCA, RETAIN = 0, 1
CODEC_NAMES = {"pca": PCA, "retain": RETAIN}
ROPE_TYPES = ("none", "norm", "neox", "mrope", "imrope")
GRID_ROPE_TYPES = ("mrope", "imrope")  # positions tell the place of a token in its image
BLOCK_SHAPES = ("raster", "tile")


class CapsuleFileError(CapsuleError):
    """A file that can not be used: one line naming it, the key or tensor, and the reason."""

    what = "capsule"

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{self.what} '{_printable(str(path))}': {_printable(reason)}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass
class Layer:
    """One model layer. H KV heads of key length d_k and value length d_v, block of N tokens, m kept tokens, K neighbours, MLP width h."""

    index: int
    head_count_kv: int
    key_length: int
    value_length: int
    k_mean: np.ndarray  # f32 [H, d_k]
    v_mean: np.ndarray  # f32 [H, d_v]
    k_basis: np.ndarray  # f32 [N, N]
    v_basis: np.ndarray  # f32 [N, N]
    k_query_weight: np.ndarray  # f32 [H, d_k]
    rope: bool = True
    freq_base: float = 10000.0
    token_order: np.ndarray | None = None  # u16 [N]; None: 0..N-1
    kept_count: int = 0  # m
    mlp_width: int = 0  # h
    k_gate: np.ndarray | None = None  # f16 [H, N-m, K, d_k]
    k_neighbours: np.ndarray | None = None  # i32 [N-m, K]
    k_mlp_up: np.ndarray | None = None  # f16 [H, h, K*d_k]
    k_mlp_up_bias: np.ndarray | None = None  # f32 [H, h]
    k_mlp_down: np.ndarray | None = None  # f16 [H, d_k, h]


@dataclass
class Tier:
    """What is stored of a block: per layer (in the order of Capsule.layers) a key codec and rows per type."""

    name: str
    key_codec: list[int]
    key_rows: list[RowCounts]
    value_rows: list[RowCounts]
    kappa: list[float]
    ratio: float = 0.0  # filled in by Capsule.set_ratios


@dataclass
class Base:
    """The model a capsule is for."""

    architecture: str
    block_count: int
    fingerprint: str
    rope_type: str = "norm"
    rope_sections: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass
class Capsule:
    base: Base
    block_size: int
    layers: list[Layer]
    tiers: list[Tier]  # tier 0 is `faithful`
    name: str = ""
    block_shape: str = "raster"
    block_width: int = 0
    image_tokens: int = 0
    neighbour_count: int = 0
    default_ratio: float = 0.8
    provenance: dict[str, Any] = field(default_factory=dict)  # kvcapsule.train.*: str, int, float, bool, list of float

    def slot_bytes(self, tier: int) -> int:
        """Bytes of the rows of one slot, all layers."""
        t = self.tiers[tier]
        return sum(
            layer.head_count_kv * (rows_bytes(k, layer.key_length) + rows_bytes(v, layer.value_length))
            for layer, k, v in zip(self.layers, t.key_rows, t.value_rows, strict=True)
        )

    def f16_bytes(self) -> int:
        """Bytes of the K and V of N tokens in f16, all layers."""
        return sum(2 * self.block_size * layer.head_count_kv * (layer.key_length + layer.value_length) for layer in self.layers)

    def ratio(self, tier: int) -> float:
        whole = self.f16_bytes()
        return 1 - self.slot_bytes(tier) / whole if whole else 0.0

    def set_ratios(self) -> None:
        for i, tier in enumerate(self.tiers):
            tier.ratio = self.ratio(i)

    def tier_for_ratio(self, ratio: float | None = None) -> int:
        """The economy tier with the nearest ratio; None or <= 0: the default of the file."""
        ratio = self.default_ratio if ratio is None or ratio <= 0 else ratio
        return min(range(1, len(self.tiers)), key=lambda i: abs(self.tiers[i].ratio - ratio))

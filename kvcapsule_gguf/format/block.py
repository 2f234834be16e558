"""A whole block of one layer: K and V -> the bytes of its rows -> K_hat and V_hat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec.pca import decode_pca, encode_pca
from ..codec.retain import Retain, decode_retain, encode_retain
from ..codec.types import RowCounts, rows_bytes
from .capsule import PCA, Capsule, Layer


@dataclass(frozen=True)
class BlockCodec:
    """One layer in one tier. K is f32 [..., H, N, d_k] without RoPE, V f32 [..., H, N, d_v]; leading dimensions are blocks."""

    layer: Layer
    key_codec: int
    key_rows: RowCounts
    value_rows: RowCounts

    @classmethod
    def of(cls, capsule: Capsule, i_layer: int, i_tier: int) -> BlockCodec:
        tier = capsule.tiers[i_tier]
        return cls(capsule.layers[i_layer], tier.key_codec[i_layer], tier.key_rows[i_layer], tier.value_rows[i_layer])

    @property
    def slot_bytes(self) -> int:
        x = self.layer
        return x.head_count_kv * (rows_bytes(self.key_rows, x.key_length) + rows_bytes(self.value_rows, x.value_length))

    def encode_keys(self, k: np.ndarray) -> np.ndarray:
        """-> uint8 [..., H, bytes]."""
        if self.key_codec == PCA:
            return encode_pca(k, self.layer.k_mean, self.layer.k_basis, self.key_rows)
        return encode_retain(np.asarray(k, np.float32), retain_of(self.layer), self.key_rows)

    def decode_keys(self, data: np.ndarray) -> np.ndarray:
        if self.key_codec == PCA:
            return decode_pca(data, self.layer.k_mean, self.layer.k_basis, self.key_rows)
        return decode_retain(data, retain_of(self.layer), self.key_rows)

    def encode_values(self, v: np.ndarray) -> np.ndarray:
        return encode_pca(v, self.layer.v_mean, self.layer.v_basis, self.value_rows)

    def decode_values(self, data: np.ndarray) -> np.ndarray:
        return decode_pca(data, self.layer.v_mean, self.layer.v_basis, self.value_rows)

    def round_trip(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V as they will be attended to."""
        return self.decode_keys(self.encode_keys(k)), self.decode_values(self.encode_values(v))


def retain_of(layer: Layer) -> Retain:
    heads, d = layer.head_count_kv, layer.key_length
    assert layer.kept_count and layer.token_order is not None and layer.k_neighbours is not None and layer.k_gate is not None
    none = np.zeros((heads, 0), np.float32)
    return Retain(
        order=np.asarray(layer.token_order, dtype=np.int64),
        kept=layer.kept_count,
        neighbours=layer.k_neighbours,
        gate=layer.k_gate.astype(np.float32),
        mlp_up=np.zeros((heads, 0, 0), np.float32) if layer.k_mlp_up is None else layer.k_mlp_up.astype(np.float32),
        mlp_up_bias=none if layer.k_mlp_up_bias is None else layer.k_mlp_up_bias,
        mlp_down=np.zeros((heads, d, 0), np.float32) if layer.k_mlp_down is None else layer.k_mlp_down.astype(np.float32),
    )

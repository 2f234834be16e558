"""Images into a cache without decoding them: as the saved state of a sequence (llama_kv_cache::state_write), written here.

The capsule's part of a state (llama_capsule_cache::state_write) says which of the hot cells hold vision tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import gguf
import numpy as np

from ..chat.args import CACHE_TYPES
from .geometry import Geometry

HEADER = struct.Struct("<IIQQQ")  # magic, version, capsule, size and hash of what follows
NULL_TOKEN = -1
MASK = (1 << 64) - 1


def cache_rows(n: int, width: int, cache: str) -> np.ndarray:
    """uint8 [n, bytes of a row]: random keys or values of n tokens."""
    x = np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)
    if cache == "f16":
        return x.astype(np.float16).view(np.uint8)
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[cache.upper()])


@dataclass(frozen=True)
class ImageState:
    """The state of one image of a geometry in a cache of these types, values transposed without flash attention."""

    geometry: Geometry
    cache_k: str
    cache_v: str
    v_trans: bool

    def data(self) -> bytes:
        """Keys and values of all layers; the same for every image."""
        g = self.geometry
        (keys, _), (values, rows) = (self._rows(cache) for cache in (self.cache_k, self.cache_v))
        if self.v_trans:
            columns = np.ascontiguousarray(rows.view(np.float16).T)
            values = struct.pack("<iII", CACHE_TYPES[self.cache_v], 2, g.n_head_kv * g.head) + columns.tobytes()
        return struct.pack("<II", self.v_trans, g.n_layer) + keys * g.n_layer + values * g.n_layer

    def _rows(self, cache: str) -> tuple[bytes, np.ndarray]:
        g = self.geometry
        rows = cache_rows(g.image_tokens, g.n_head_kv * g.head, cache)
        return struct.pack("<iQ", CACHE_TYPES[cache], rows.shape[1]) + rows.tobytes(), rows

    def cells(self, first: int) -> bytes:
        """Positions of an image that begins at `first`, each cell in one sequence."""
        g = self.geometry
        n = g.image_tokens
        seq = np.zeros(n, np.int32)
        one = np.ones(n, np.int32)
        if g.mrope:
            y, x = np.divmod(np.arange(n, dtype=np.int32), g.side)
            columns = [np.full(n, first, np.int32), one, first + x, first + y, np.full(n, NULL_TOKEN, np.int32), seq]
        else:
            columns = [first + np.arange(n, dtype=np.int32), one, seq]
        return np.stack(columns, 1).astype("<i4").tobytes()


def state_hash(data: bytes, seed: int = 0) -> int:
    """llama_capsule_state_v4::hash()."""
    h = seed ^ ((len(data) * 0x9E3779B97F4A7C15) & MASK)
    for i in range(0, len(data), 8):
        h = ((h ^ int.from_bytes(data[i : i + 8], "little")) * 0x9FB21C651E98DF25) & MASK
        h ^= h >> 32
    return h


def vision_part(empty: bytes, p0: int, p1: int) -> bytes:
    """The capsule's part for hot vision tokens at [p0, p1); `empty` is that of a state without cells: its header names the capsule."""
    magic, version, capsule, _, _ = HEADER.unpack(empty[: HEADER.size])
    meta = struct.pack("<IIIiiiI", 1, 0, 0, 0, p0, p1, 0)
    return HEADER.pack(magic, version, capsule, len(meta), state_hash(meta)) + meta

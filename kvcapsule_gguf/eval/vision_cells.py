"""What a quantized cache would do to the vision cells alone: the f16 cells in the saved state of a sequence are rounded as llama.cpp rounds them.

They keep their place and stay f16: only the values are those of the other type.
"""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass

import numpy as np

from ..codec.hadamard import hadamard
from ..native import LayerShape, Native

EXT_BYTES = 12  # llama_kv_cell_ext: column, row, token


@dataclass
class Cells:
    """One cache of a state; the arrays are views of its bytes."""

    positions: np.ndarray  # i32 [n]
    keys: list[np.ndarray]  # f16 [n, heads * d], or u8 [n, bytes] of another type, for each layer
    values: list[np.ndarray]


def read(state: bytearray, places: bool) -> list[Cells]:
    """The caches in a state (llama_kv_cache::state_write); places: the model has several positions for a token. Raises ValueError."""
    reader, found = _Reader(state), []
    reader.view("<u4", 2)  # what it is, and the sequence
    while reader.at < len(state):
        if reader.take("<u4") != 1:
            raise ValueError("the state holds more than a cache of one stream")
        found.append(_cache(reader, places))
    return found


class _Reader:
    def __init__(self, data: bytearray) -> None:
        self.data, self.at = data, 0

    def view(self, dtype: str, *shape: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        if size > len(self.data) - self.at:
            raise ValueError("the state has an unknown form")
        out = np.frombuffer(memoryview(self.data)[self.at : self.at + size], dtype).reshape(shape)
        self.at += size
        return out

    def take(self, dtype: str) -> int:
        return int(self.view(dtype, 1)[0])


def _cache(reader: _Reader, places: bool) -> Cells:
    n, positions = reader.take("<u4"), []
    for _ in range(n):
        positions.append(reader.take("<i4"))
        n_seq = reader.take("<u4")
        reader.view("u1", EXT_BYTES if places else 0)
        reader.view("<i4", n_seq)
    if n == 0:
        return Cells(np.zeros(0, np.int32), [], [])
    transposed, n_layer = reader.take("<u4"), reader.take("<u4")

    def rows() -> np.ndarray:
        kind, size = reader.take("<i4"), reader.take("<u8")
        return reader.view("<f2", n, size // 2) if kind == 1 else reader.view("u1", n, size)

    def columns() -> np.ndarray:
        reader.view("<i4", 2)  # type and bytes of an element
        return reader.view("<f2", reader.take("<u4"), n).T

    keys = [rows() for _ in range(n_layer)]
    return Cells(np.array(positions, np.int32), keys, [columns() if transposed else rows() for _ in range(n_layer)])


def quantize(native: Native, caches: list[Cells], spans: list[tuple[int, int]], shapes: list[LayerShape], k: str, v: str) -> None:
    """Rounds the cells at positions [p0, p1) in place: keys as type k, values as type v."""
    rotated = [(k, _rotation({x.d_k for x in shapes if x.n_head_kv}, 1 << 30)), (v, _rotation({x.d_v for x in shapes if x.n_head_kv}, 64))]
    for cells in caches:
        at = np.flatnonzero(np.any([(p0 <= cells.positions) & (cells.positions < p1) for p0, p1 in spans], 0))
        for (kind, n), arrays in zip(rotated, (cells.keys, cells.values)):
            for x in arrays if kind != "f16" else []:
                x[at] = round_trip(native, x[at].astype(np.float32), kind, n)


def _rotation(lengths: set[int], most: int) -> int:
    """Channels that llama.cpp rotates together before it quantizes, 1 = it does not (llama_kv_cache, attn_rot_k and attn_rot_v)."""
    d = lengths.pop() if len(lengths) == 1 else 1
    return min(d & -d, most) if d % 64 == 0 else 1


def round_trip(native: Native, x: np.ndarray, kind: str, rotation: int) -> np.ndarray:
    """f32 [n, channels] -> what is left of it, by ggml's own functions."""
    base = native.ggml_base
    y = np.ascontiguousarray(hadamard(x.reshape(-1, rotation)), np.float32)
    packed = np.empty(2 * y.size, np.uint8)  # no type takes more than 8.5 bits
    base[f"quantize_row_{kind}_ref"](c.c_void_p(y.ctypes.data), c.c_void_p(packed.ctypes.data), c.c_int64(y.size))
    base[f"dequantize_row_{kind}"](c.c_void_p(packed.ctypes.data), c.c_void_p(y.ctypes.data), c.c_int64(y.size))
    return hadamard(y).reshape(x.shape)

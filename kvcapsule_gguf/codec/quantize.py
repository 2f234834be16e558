"""Rows to and from ggml's byte layouts (block_q8_0, block_q4_0 of ggml-common.h), byte-identical to its `quantize_row_*_ref`.

Every quantizer takes f32 [n, d] and returns uint8 [n, bytes of a row]; every dequantizer is the inverse.
"""

from __future__ import annotations

import numpy as np

from .hadamard import hadamard


def encode_f32(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype="<f4").view(np.uint8)


def decode_f32(data: np.ndarray, d: int) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f4").reshape(-1, d).astype(np.float32)


def encode_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def decode_f16(data: np.ndarray, d: int) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").reshape(-1, d).astype(np.float32)


def encode_q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32: f16 d = max|x| / 127, then int8 round(x / d), halves away from zero."""
    blocks = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, 32)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore"):  # a subnormal d: its inverse is infinite, here as in ggml
        q = blocks * _inverse(d)
        q = np.trunc(q + np.copysign(np.float32(0.49999997), q)).astype(np.int8)
    return _pack(d, q.view(np.uint8), len(x))


def decode_q8_0(data: np.ndarray, d: int) -> np.ndarray:
    scale, q = _unpack(data, 32)
    return (scale * q.view(np.int8).astype(np.float32)).reshape(-1, d)


def encode_q4_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32: f16 d = (the first value of largest magnitude) / -8, then 4-bit x / d + 8, value i in the low and i + 16 in the high half."""
    blocks = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    d = largest / np.float32(-8)
    with np.errstate(invalid="ignore"):
        q = np.minimum(15, (blocks * _inverse(d) + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    return _pack(d, q[:, :16] | q[:, 16:] << 4, len(x))


def decode_q4_0(data: np.ndarray, d: int) -> np.ndarray:
    scale, q = _unpack(data, 16)
    codes = np.concatenate([q & 15, q >> 4], 1).astype(np.float32) - 8
    return (scale * codes).reshape(-1, d)


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d != 0, np.float32(1) / d, np.float32(0))


def _pack(d: np.ndarray, q: np.ndarray, rows: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        scale = np.ascontiguousarray(d.astype("<f2")).view(np.uint8).reshape(-1, 2)
    return np.concatenate([scale, q], 1).reshape(rows, -1)


def _unpack(data: np.ndarray, q_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = np.ascontiguousarray(data).reshape(-1, 2 + q_bytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scale, np.ascontiguousarray(blocks[:, 2:])


ENCODE = {"f32": encode_f32, "f16": encode_f16, "q8_0": encode_q8_0, "q4_0": encode_q4_0}
DECODE = {"f32": decode_f32, "f16": decode_f16, "q8_0": decode_q8_0, "q4_0": decode_q4_0}


def rotated(x: np.ndarray, name: str) -> np.ndarray:
    """f32 [..., d] -> the same as a quantized KV cache of llama.cpp gives it back: rotated by a Hadamard matrix, quantized, and rotated back."""
    y = hadamard(x).reshape(-1, x.shape[-1])
    return hadamard(DECODE[name](ENCODE[name](y), x.shape[-1])).reshape(x.shape)

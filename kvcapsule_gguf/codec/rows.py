"""A list of rows of length d in the fixed order of types: what a compressed block stores for one head.

Rows of quantized types are Hadamard-rotated before they are quantized, and rotated back after; f32 and f16 rows are stored as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .hadamard import hadamard
from .quantize import DECODE, ENCODE
from .types import ROW_TYPES, rows_bytes, total_rows


def encode_rows(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """f32 [..., R, d] -> uint8 [..., rows_bytes(counts, d)]; R = total_rows(counts), the rows of a type are contiguous."""
    *lead, n_rows, d = rows.shape
    if n_rows != total_rows(counts):
        raise ValueError(f"{n_rows} rows for counts {tuple(counts)}")
    flat = np.asarray(rows, dtype=np.float32).reshape(math.prod(lead), n_rows, d)
    parts = []
    first = 0
    for row_type, n in zip(ROW_TYPES, counts, strict=True):
        if n:
            row_type.row_bytes(d)  # raises if the type does not fit d
            segment = flat[:, first : first + n].reshape(-1, d)
            data = ENCODE[row_type.name](hadamard(segment) if row_type.quantized else segment)
            parts.append(data.reshape(len(flat), -1))
            first += n
    data = np.concatenate(parts, 1) if parts else np.zeros((len(flat), 0), np.uint8)
    return data.reshape(*lead, data.shape[1])


def decode_rows(data: np.ndarray, counts: Sequence[int], d: int) -> np.ndarray:
    """uint8 [..., rows_bytes(counts, d)] -> f32 [..., R, d]."""
    *lead, size = data.shape
    if size != rows_bytes(counts, d):
        raise ValueError(f"{size} bytes for counts {tuple(counts)} of length {d}, not {rows_bytes(counts, d)}")
    flat = data.reshape(math.prod(lead), size)
    parts = []
    offset = 0
    for row_type, n in zip(ROW_TYPES, counts, strict=True):
        if n:
            width = n * row_type.row_bytes(d)
            rows = DECODE[row_type.name](flat[:, offset : offset + width].reshape(-1, width // n), d)
            parts.append((hadamard(rows) if row_type.quantized else rows).reshape(len(flat), n, d))
            offset += width
    rows = np.concatenate(parts, 1) if parts else np.zeros((len(flat), 0, d), np.float32)
    return rows.reshape(*lead, *rows.shape[1:])


def round_trip(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The rows as they will be read: f32 [..., R, d] -> f32 [..., R, d]."""
    return decode_rows(encode_rows(rows, counts), counts, rows.shape[-1])


def split_counts(counts: Sequence[int], m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The counts of the first m rows of a list, and of the rest."""
    head, left = [], m
    for n in counts:
        head.append(min(n, left))
        left -= head[-1]
    if left:
        raise ValueError(f"{m} rows of a list of {total_rows(counts)}")
    return tuple(head), tuple(n - h for n, h in zip(counts, head, strict=True))

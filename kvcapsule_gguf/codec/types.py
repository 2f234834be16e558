"""The row types of a capsule: names, sizes, and which head sizes they fit. The sizes are ggml's (ggml-common.h of the pinned llama.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowType:
    """A ggml type: `block` values are stored in `block_bytes` bytes; `quantized` rows are Hadamard-rotated."""

    name: str
    block: int
    block_bytes: int
    quantized: bool

    def fits(self, d: int) -> bool:
        return d % self.block == 0

    def row_bytes(self, d: int) -> int:
        if not self.fits(d):
            raise ValueError(f"row type {self.name} needs a head size that is a multiple of {self.block}, not {d}")
        return d // self.block * self.block_bytes


F32 = RowType("f32", 1, 4, False)
F16 = RowType("f16", 1, 2, False)
Q8_0 = RowType("q8_0", 32, 34, True)
Q4_0 = RowType("q4_0", 32, 18, True)
Q2_0 = RowType("q2_0", 64, 18, True)

# The fixed order of the types in every list of rows.
ROW_TYPES = (F32, F16, Q8_0, Q4_0, Q2_0)
TYPE_NAMES = tuple(t.name for t in ROW_TYPES)

# Rows per type, in the order of ROW_TYPES.
RowCounts = tuple[int, int, int, int, int]


def row_counts(**rows: int) -> RowCounts:
    """row_counts(q8_0=4, q4_0=12) -> (0, 0, 4, 12, 0)."""
    unknown = set(rows) - set(TYPE_NAMES)
    if unknown:
        raise ValueError(f"unknown row type {', '.join(sorted(unknown))}")
    return tuple(int(rows.get(name, 0)) for name in TYPE_NAMES)  # type: ignore[return-value]


def total_rows(counts: Sequence[int]) -> int:
    return int(sum(counts))


def rows_bytes(counts: Sequence[int], d: int) -> int:
    """Bytes of a list of rows of length d."""
    return sum(int(n) * t.row_bytes(d) for t, n in zip(ROW_TYPES, counts, strict=True) if n)


def legal(counts: Sequence[int], d: int) -> RowCounts:
    """The same rows with types that fit d: what does not is moved up, q2_0 -> q4_0 -> q8_0 -> f16."""
    out = [int(n) for n in counts]
    for i in range(len(ROW_TYPES) - 1, 1, -1):
        if not ROW_TYPES[i].fits(d):
            out[i - 1] += out[i]
            out[i] = 0
    return tuple(out)  # type: ignore[return-value]

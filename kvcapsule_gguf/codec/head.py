"""One head of one tile: K or V -> the bytes of a slot -> what is read back (format v2).

A tile has h * w rows (codec/tiles.py). Row 0, the constant, is a block of its own; the others make blocks of two, (1, 2), (3, 4), ...; a last row may
be left alone. A table says with how many bits a block of rows is stored in each group of channels: 0 is not stored, 16 is f16, 32 is
f32 (for tests).
The bytes: the scales (f16) of all stored blocks, then their codes, each padded to 8 bytes; a block of 0 bits has neither, f16 and f32 no scale. Both go group
after group: scales from smooth to rough; codes of the constant row, then of the pairs from many bits to few (f32 last), then of the row that is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channels import gather, scatter
from .planes import code_bytes, pack, unpack
from .registers import mix
from .scale import search
from .tiles import SIDE, inverse, row_order, transform
from .transform import Learned, Retain

F16, F32 = 16, 32
FLOATS = {F16: "<f2", F32: "<f4"}  # the types of blocks without a scale


def row_blocks(n: int, rows: int = 2) -> list[slice]:
    """The rows of each block of a tile of n rows; the format has two rows in a block."""
    return [slice(0, 1)] + [slice(i, min(i + rows, n)) for i in range(1, n, rows)]


def table_rows(height: int, width: int) -> np.ndarray:
    """int [blocks]: the row of a whole tile's table that each block of this tile uses.

    A table is made for 8 x 8 tokens. Row (u, v) of a shorter tile uses what the whole tile has at the same place of the spectrum.
    """
    u, v = np.divmod(row_order(height, width), width)
    near = (2 * u + 1) * SIDE // (2 * height) * SIDE + (2 * v + 1) * SIDE // (2 * width)
    rank = np.empty(SIDE * SIDE, np.int64)
    rank[row_order(SIDE, SIDE)] = np.arange(len(rank))
    first = rank[near[[b.start for b in row_blocks(height * width)]]]
    out = (first + 1) // 2
    out[0] = 0
    return out


@dataclass(frozen=True)
class Head:
    """mean f32 [d]; groups: int [2, lanes] each; axes f32 [d, d] (columns are axes) or None; table uint8 [33, groups] of bits.

    whole: the transform of a whole tile, if it is not the DCT.
    """

    mean: np.ndarray
    groups: list[np.ndarray]
    table: np.ndarray
    axes: np.ndarray | None = None
    whole: Learned | Retain | None = None

    def plan(self, height: int, width: int) -> list[tuple[slice, np.ndarray, int, int]]:
        """(rows, group, bits, number of the scale) of all stored blocks, in the order of their codes."""
        used, blocks = table_rows(height, width), row_blocks(height * width)
        out, scales = [], 0
        for g, group in enumerate(self.groups):
            bits = [int(b) for b in self.table[used, g]]
            number = scales + np.cumsum([0 < b < F16 for b in bits]) - 1
            scales = int(number[-1]) + 1
            pairs = [i for i, rows in enumerate(blocks) if i and rows.stop - rows.start == 2]
            order = [0, *sorted(pairs, key=lambda i: -(bits[i] % F32)), *range(len(pairs) + 1, len(blocks))]
            out += [(blocks[i], group, bits[i], int(number[i])) for i in order if bits[i]]
        return out

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Bytes of the scales, and of the codes, of a slot of this head."""
        plan = self.plan(height, width)
        scales = sum(2 for *_, bits, _ in plan if bits not in FLOATS)
        codes = sum(_code_bytes((rows.stop - rows.start) * group.size, bits) for rows, group, bits, _ in plan)
        return -(-scales // 8) * 8, -(-codes // 8) * 8

    def size(self, height: int, width: int) -> int:
        """Bytes of a slot of this head."""
        return sum(self.sizes(height, width))

    def rows(self, x: np.ndarray, height: int, width: int) -> np.ndarray:
        """f32 [..., height * width, d] -> its coefficients, same shape, in the head's axes."""
        x = x.astype(np.float32) - self.mean
        whole = self.whole if height * width == SIDE * SIDE else None
        rows = transform(x, height, width) if whole is None else whole.rows(x, lambda rows: self.load(self.store(rows, height, width), height, width))
        return rows if self.axes is None else rows @ self.axes

    def encode(self, x: np.ndarray, height: int, width: int) -> np.ndarray:
        """f32 [..., height * width, d] -> uint8 [..., size]."""
        return self.store(self.rows(x, height, width), height, width)

    def store(self, rows: np.ndarray, height: int, width: int) -> np.ndarray:
        lead, (scale_bytes, code_bytes) = rows.shape[:-2], self.sizes(height, width)
        scales, codes, at = np.zeros((*lead, scale_bytes // 2), "<f2"), np.zeros((*lead, code_bytes), np.uint8), 0
        for block, group, bits, number in self.plan(height, width):
            x = gather(rows[..., block, :], group)
            x = mix(x.reshape(*lead, -1, x.shape[-1]))  # registers of all rows
            if bits in FLOATS:
                finite = np.clip(np.where(np.isnan(x), 0, x), -65504, 65504) if bits == F16 else x
                data = np.ascontiguousarray(finite.reshape(*lead, -1), FLOATS[bits]).view(np.uint8)
            else:
                d, c = search(x.reshape(-1, x.shape[-2] * x.shape[-1]), bits)
                scales[..., number] = d.reshape(lead)
                data = pack(c.reshape(x.shape), bits)
            codes[..., at : at + data.shape[-1]] = data
            at += data.shape[-1]
        return np.concatenate([scales.view(np.uint8), codes], -1)

    def load(self, data: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [..., size] -> coefficients f32 [..., height * width, d]."""
        lead, (at, _) = data.shape[:-1], self.sizes(height, width)
        scales = _floats(data[..., :at])
        rows = np.zeros((*lead, height * width, len(self.mean)), np.float32)
        for block, group, bits, number in self.plan(height, width):
            n = block.stop - block.start
            shape = (2 * n, group.shape[1])
            size = _code_bytes(shape[0] * shape[1], bits)
            raw = data[..., at : at + size]
            at += size
            x = _floats(raw, bits).reshape(*lead, *shape) if bits in FLOATS else unpack(raw, bits, shape) * scales[..., number, None, None]
            scatter(rows[..., block, :], group, mix(x).reshape(*lead, n, 2, group.shape[1]))
        return rows

    def decode(self, data: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [..., size] -> f32 [..., height * width, d]."""
        rows = self.load(data, height, width)
        if self.axes is not None:
            rows = rows @ self.axes.T
        whole = self.whole if height * width == SIDE * SIDE else None
        return (inverse(rows, height, width) if whole is None else whole.tokens(rows)) + self.mean


def _code_bytes(values: int, bits: int) -> int:
    return bits // 8 * values if bits in FLOATS else code_bytes(bits, values)


def _floats(data: np.ndarray, bits: int = F16) -> np.ndarray:
    return np.ascontiguousarray(data).view(FLOATS[bits]).astype(np.float32)

"""One head of one tile: K or V -> the bytes of a slot -> what is read back (format v2).

A tile has h * w rows (codec/tiles.py). Row 0, the constant, is a block of its own; the others make blocks of two, (1, 2), (3, 4), ...; a last row may
be left alone. A table says with how many bits a block of rows is stored in each group of channels: 0 is not stored, 16 is f16.
The bytes: the scales (f16) of all stored blocks, then their codes; rows of blocks first, then groups. A block of 0 bits has neither, f16 no scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channels import gather, scatter
from .planes import code_bytes, pack, unpack
from .registers import mix
from .scale import search
from .tiles import SIDE, inverse, row_order, transform

F16 = 16
RUN = (1, 64)


def row_blocks(n: int, rows: int = 2) -> list[slice]:
    """The rows of each block of a tile of n rows; the format has two rows in a block."""
    return [slice(0, 1)] + [slice(i, min(i + rows, n)) for i in range(1, n, rows)]


def table_rows(height: int, width: int) -> np.ndarray:
    """int [blocks]: the row of a whole tile's table that each block of this tile uses.

    A table is made for 8 x 8 (or 1 x 64) tokens. Row (u, v) of a shorter tile uses what the whole tile has at the same place of the spectrum.
    """
    whole = (SIDE, SIDE) if height > 1 or width <= SIDE else RUN
    u, v = np.divmod(row_order(height, width), width)
    near = (2 * u + 1) * whole[0] // (2 * height) * whole[1] + (2 * v + 1) * whole[1] // (2 * width)
    rank = np.empty(whole[0] * whole[1], np.int64)
    rank[row_order(*whole)] = np.arange(len(rank))
    first = rank[near[[b.start for b in row_blocks(height * width)]]]
    out = (first + 1) // 2
    out[0] = 0
    return out


@dataclass(frozen=True)
class Head:
    """mean f32 [d]; groups: int [2, lanes] each; axes f32 [d, d] (columns are axes) or None; table uint8 [33, groups] of bits."""

    mean: np.ndarray
    groups: list[np.ndarray]
    table: np.ndarray
    axes: np.ndarray | None = None

    def plan(self, height: int, width: int) -> list[tuple[slice, np.ndarray, int]]:
        """(rows, group, bits) of all stored blocks, in the order of the bytes."""
        used = table_rows(height, width)
        return [
            (rows, group, int(self.table[used[i], g]))
            for i, rows in enumerate(row_blocks(height * width))
            for g, group in enumerate(self.groups)
            if self.table[used[i], g]
        ]

    def size(self, height: int, width: int) -> int:
        """Bytes of a slot of this head."""
        total = 0
        for rows, group, bits in self.plan(height, width):
            values = (rows.stop - rows.start) * group.size
            total += 2 * values if bits == F16 else 2 + code_bytes(bits, values)
        return total

    def rows(self, x: np.ndarray, height: int, width: int) -> np.ndarray:
        """f32 [..., height * width, d] -> its coefficients, same shape, in the head's axes."""
        rows = transform(x.astype(np.float32) - self.mean, height, width)
        return rows if self.axes is None else rows @ self.axes

    def encode(self, x: np.ndarray, height: int, width: int) -> np.ndarray:
        """f32 [..., height * width, d] -> uint8 [..., size]."""
        return self.store(self.rows(x, height, width), height, width)

    def store(self, rows: np.ndarray, height: int, width: int) -> np.ndarray:
        lead, scales, codes = rows.shape[:-2], [], []
        for block, group, bits in self.plan(height, width):
            x = gather(rows[..., block, :], group)
            x = mix(x.reshape(*lead, -1, x.shape[-1]))  # registers of all rows
            if bits == F16:
                codes.append(_bytes(np.clip(x, -65504, 65504).reshape(*lead, -1)))
                continue
            d, c = search(x.reshape(-1, x.shape[-2] * x.shape[-1]), bits)
            scales.append(_bytes(d.reshape(*lead, 1)))
            codes.append(pack(c.reshape(x.shape), bits))
        return np.concatenate([*scales, *codes, np.zeros((*lead, 0), np.uint8)], -1)

    def load(self, data: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [..., size] -> coefficients f32 [..., height * width, d]."""
        lead, plan = data.shape[:-1], self.plan(height, width)
        rows = np.zeros((*lead, height * width, len(self.mean)), np.float32)
        at, code_at = 0, 2 * sum(bits != F16 for *_, bits in plan)
        for block, group, bits in plan:
            n = block.stop - block.start
            shape = (2 * n, group.shape[1])
            values = shape[0] * shape[1]
            size = 2 * values if bits == F16 else code_bytes(bits, values)
            raw = data[..., code_at : code_at + size]
            code_at += size
            if bits == F16:
                x = _floats(raw).reshape(*lead, *shape)
            else:
                x = unpack(raw, bits, shape) * _floats(data[..., at : at + 2])[..., None]
                at += 2
            part = rows[..., block, :]
            scatter(part, group, mix(x).reshape(*lead, n, 2, group.shape[1]))
        return rows

    def decode(self, data: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [..., size] -> f32 [..., height * width, d]."""
        rows = self.load(data, height, width)
        return inverse(rows if self.axes is None else rows @ self.axes.T, height, width) + self.mean


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def _floats(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)

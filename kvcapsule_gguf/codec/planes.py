"""The bytes of the codes of a block: planes of 8, 4, 2 and 1 bits, the high bits first.

Codes are stored as c + 2^(b-1) (1 bit: 0 for -1, 1 for +1). 3 bits are a plane of 2 and one of 1, 5 are 4 and 1, 6 are 4 and 2. With R registers of L lanes
(R is 2 or 4; an edge group has L < 16):

    8 bits   register after register, a byte a lane
    4 bits   a byte of lane i holds registers 0 (low half) and 1, then 2 and 3
    2 bits   a byte of lane i holds registers 0 (lowest), 1, 2, 3; with 2 registers a byte holds lanes 2 i and 2 i + 1
    1 bit    a bit for register after register, lane after lane, lowest bit first

So 64 codes of b bits take 8 b bytes, and a kernel needs shifts and masks, no shuffles.
"""

from __future__ import annotations

import numpy as np

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def code_bytes(bits: int, values: int) -> int:
    return sum(-(-values * p // 8) for p in PLANES[bits])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int [..., R, L] -> uint8 [..., bytes]."""
    u = np.where(codes > 0, 1, 0) if bits == 1 else codes + (1 << bits - 1)
    u, left, out = u.astype(np.uint8), bits, []
    for p in PLANES[bits]:
        left -= p
        out.append(_pack_plane(u >> left & (1 << p) - 1, p))
    return np.concatenate(out, -1)


def unpack(data: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [..., bytes] -> int16 [..., R, L] for shape (R, L)."""
    values, at, u = shape[0] * shape[1], 0, np.zeros((*data.shape[:-1], *shape), np.uint8)
    for p in PLANES[bits]:
        size = -(-values * p // 8)
        u = u << p | _unpack_plane(data[..., at : at + size], p, shape)
        at += size
    return np.where(u > 0, 1, -1).astype(np.int16) if bits == 1 else u.astype(np.int16) - (1 << bits - 1)


def _pack_plane(u: np.ndarray, p: int) -> np.ndarray:
    flat = _lane_order(u, p)
    if p == 1:
        return np.packbits(flat, -1, "little")
    per = 8 // p
    flat = np.concatenate([flat, np.zeros((*flat.shape[:-1], -flat.shape[-1] % per), np.uint8)], -1).reshape(*flat.shape[:-1], -1, per)
    out = np.zeros(flat.shape[:-1], np.uint8)
    for i in range(per):
        out |= flat[..., i] << p * i
    return out


def _unpack_plane(data: np.ndarray, p: int, shape: tuple[int, int]) -> np.ndarray:
    values = shape[0] * shape[1]
    if p == 1:
        flat = np.unpackbits(data, -1, values, "little")
    else:
        flat = (data[..., None] >> (np.arange(8 // p, dtype=np.uint8) * p) & (1 << p) - 1).reshape(*data.shape[:-1], -1)[..., :values]
    where = _lane_order(np.arange(values).reshape(shape), p)
    out = np.empty((*data.shape[:-1], values), np.uint8)
    out[..., where] = flat
    return out.reshape(*data.shape[:-1], *shape)


def _lane_order(u: np.ndarray, p: int) -> np.ndarray:
    """[..., R, L] -> [..., values], those that share a byte beside each other."""
    r, lanes = u.shape[-2:]
    if p in (1, 8):
        return u.reshape(*u.shape[:-2], -1)
    if p == 4:
        pairs = u.reshape(*u.shape[:-2], r // 2, 2, lanes).swapaxes(-1, -2)
        return pairs.reshape(*u.shape[:-2], -1)
    return u.swapaxes(-1, -2).reshape(*u.shape[:-2], -1)

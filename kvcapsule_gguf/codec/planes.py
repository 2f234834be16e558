"""The bytes of the codes of a block: planes of 8, 4 or 2 bits, so that a kernel needs shifts and masks, no shuffles.

Codes are stored as c + 2^(bits - 1) (1 bit: 0 for -1, 1 for +1). A block of n rows (1 or 2) has two registers of L lanes for each row; element
lane * n + row holds the codes a and b of the two registers:

    1, 2, 4 bits   a plane of 2, 4, 8 bits an element: a | b << bits
    3 bits         a plane of 4 bits: b & 1 | a << 1, and one of 2 bits: b >> 1
    6 bits         a plane of 8 bits: b & 3 | a << 2, and one of 4 bits: b >> 2
    8 bits         a plane of 8 bits with all a, and one with all b

Byte k of a plane of m bytes has the elements k, k + m, k + 2 m, ..., from the lowest bits up. So 64 codes of b bits take 8 b bytes.
"""

from __future__ import annotations

import numpy as np

# bits -> the width of an element in each plane
PLANES = {1: (2,), 2: (4,), 3: (4, 2), 4: (8,), 6: (8, 4), 8: (8, 8)}


def code_bytes(bits: int, values: int) -> int:
    """values: of both registers."""
    return sum(-(-(values // 2) * p // 8) for p in PLANES[bits])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int [..., 2 n, L] -> uint8 [..., bytes]."""
    u = (np.where(codes > 0, 1, 0) if bits == 1 else codes + (1 << bits - 1)).astype(np.uint16)
    a, b = (u[..., i::2, :].swapaxes(-1, -2).reshape(*u.shape[:-2], -1) for i in range(2))
    low = PLANES[bits][0] - bits  # bits of b in the first plane
    planes = [a | b << bits] if low == bits else [a << low | b & (1 << low) - 1, b >> low]
    return np.concatenate([_pack_plane(p.astype(np.uint8), width) for p, width in zip(planes, PLANES[bits])], -1)


def unpack(data: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [..., bytes] -> int16 [..., 2 n, L] for shape (2 n, L)."""
    n, at, planes = shape[0] * shape[1] // 2, 0, []
    for width in PLANES[bits]:
        size = -(-n * width // 8)
        planes.append(_unpack_plane(data[..., at : at + size], width, n))
        at += size
    low = PLANES[bits][0] - bits
    if low == bits:
        a, b = planes[0] & (1 << bits) - 1, planes[0] >> bits
    else:
        a, b = planes[0] >> low, planes[1] << low | planes[0] & (1 << low) - 1
    both = np.stack([x.reshape(*data.shape[:-1], shape[1], -1).swapaxes(-1, -2) for x in (a, b)], -2)  # [..., n, 2, L]
    u = both.reshape(*data.shape[:-1], *shape)
    return np.where(u > 0, 1, -1).astype(np.int16) if bits == 1 else (u - (1 << bits - 1)).astype(np.int16)


def _pack_plane(u: np.ndarray, width: int) -> np.ndarray:
    per = 8 // width
    size = -(-u.shape[-1] // per)
    padded = np.concatenate([u, np.zeros((*u.shape[:-1], size * per - u.shape[-1]), np.uint8)], -1).reshape(*u.shape[:-1], per, size)
    return np.bitwise_or.reduce(padded << np.arange(0, 8, width, dtype=np.uint8)[:, None], -2)


def _unpack_plane(data: np.ndarray, width: int, n: int) -> np.ndarray:
    """-> int16 [..., n]."""
    u = data[..., None, :] >> np.arange(0, 8, width, dtype=np.uint8)[:, None] & (1 << width) - 1
    return u.reshape(*data.shape[:-1], -1)[..., :n].astype(np.int16)

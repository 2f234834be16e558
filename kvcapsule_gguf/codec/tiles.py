"""Tiles: which tokens of a picture are stored together, and the transform over the tokens of one tile (format v2, docs/reference/format-v2.md).

A picture of h x w tokens is cut into tiles of 8 x 8; what is left at the right and at the bottom makes shorter tiles.
Where positions do not tell the grid, the keys do (`grid_width`).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np

SIDE = 8
MAX_ASPECT = 8
CLEARLY = 0.9  # most pictures of a square number of tokens are squares: another width has to be that much better


def cut_side(n: int) -> list[int]:
    """Lengths of the tiles along a side of n tokens: 16 -> [8, 8], 20 -> [8, 8, 4]."""
    return [SIDE] * (n // SIDE) + ([n % SIDE] if n % SIDE else [])


def cut_grid(height: int, width: int) -> list[tuple[int, int, np.ndarray]]:
    """(height, width, int tokens [height * width]) of every tile, from left to right and from top to bottom, each line by line."""
    at = np.arange(height * width).reshape(height, width)
    out, y = [], 0
    for h in cut_side(height):
        x = 0
        for w in cut_side(width):
            out.append((h, w, at[y : y + h, x : x + w].ravel()))
            x += w
        y += h
    return out


def cut_run(n: int) -> list[tuple[int, int, np.ndarray]]:
    """The same for n tokens without a grid: lines of 8, and a shorter last one. 150 -> 8 x 8, 8 x 8, 2 x 8, 1 x 6."""
    out = cut_grid(n // SIDE, SIDE)
    if n % SIDE:
        out.append((1, n % SIDE, np.arange(n - n % SIDE, n)))
    return out


def grid_width(keys: np.ndarray) -> int:
    """How many tokens wide a picture is, from its keys f32 [n, ...] without RoPE in some layer.

    The width for which neighbours in a column and in a row are most alike. Tried are the widths that divide n; those that divide n + 1, since rows may end
    with a token of their own, which the last one lacks; and 8, whether it divides n or not. A square smaller than a tile is a square. The library does the same (src/capsule/compress/grid.cpp).
    """
    n, x = len(keys), keys.reshape(len(keys), -1)
    if n < SIDE**2 and isqrt(n) ** 2 == n:
        return isqrt(n)
    left = np.square(x[1:] - x[:-1]).sum(-1)

    def roughness(w: int) -> float:
        """The mean squared distance of neighbours in a column, and that of neighbours in a row."""
        return float(np.square(x[w:] - x[:-w]).sum(-1).mean() + left[np.arange(1, n) % w > 0].mean())

    widths = [w for w in range(SIDE + 1, (n + 1) // SIDE + 1) if (n % w == 0 or (n + 1) % w == 0) and max(w, (n + 1) // w) <= MAX_ASPECT * min(w, (n + 1) // w)]
    return min((SIDE, *widths), key=lambda w: roughness(w) * (CLEARLY if w * w == n else 1)) if widths else SIDE


@lru_cache(maxsize=256)
def dct(n: int) -> np.ndarray:
    """DCT-II of n points, f32 [n, n], orthonormal; rows from smooth to rough."""
    t = np.arange(n)
    rows = np.cos(np.pi * (t + 0.5) * t[:, None] / n) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    return rows.astype(np.float32)


@lru_cache(maxsize=256)
def row_order(height: int, width: int) -> np.ndarray:
    """int [height * width]: the coefficients (u, v), numbered u * width + v, from smooth to rough.

    Sorted by the squared frequency (u / height)^2 + (v / width)^2, in integers; ties by u.
    """
    u, v = np.divmod(np.arange(height * width), width)
    return np.lexsort((u, (u * width) ** 2 + (v * height) ** 2))


def transform(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """f32 [..., height * width, d] tokens of a tile, line by line -> f32 [..., height * width, d] rows, in `row_order`."""
    y = x.reshape(*x.shape[:-2], height, width, x.shape[-1])
    y = np.einsum("uy,vx,...yxd->...uvd", dct(height), dct(width), y, optimize=True)
    return y.reshape(x.shape)[..., row_order(height, width), :]


def inverse(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """The tokens of `transform`'s rows."""
    y = np.empty_like(rows)
    y[..., row_order(height, width), :] = rows
    y = y.reshape(*rows.shape[:-2], height, width, rows.shape[-1])
    y = np.einsum("uy,vx,...uvd->...yxd", dct(height), dct(width), y, optimize=True)
    return np.ascontiguousarray(y.reshape(rows.shape))

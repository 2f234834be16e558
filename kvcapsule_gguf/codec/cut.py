"""Which tokens of a picture make a block, see docs/codec.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockShape:
    """Blocks of `size` tokens: consecutive ones, or tiles tile_width tokens wide."""

    size: int
    tile_width: int = 0  # 0: raster

    @property
    def kind(self) -> str:
        return "tile" if self.tile_width else "raster"

    def __str__(self) -> str:
        return f"tile:{self.tile_width}x{self.size // self.tile_width}" if self.tile_width else f"raster:{self.size}"

    @classmethod
    def parse(cls, text: str) -> BlockShape:
        """ "raster:64" or "tile:8x8" (width, height). Raises ValueError."""
        found = re.fullmatch(r"raster:([1-9]\d{0,3})|tile:([1-9]\d{0,3})x([1-9]\d{0,3})", text)
        if not found:
            raise ValueError(f"{text} is neither raster:N nor tile:WxH")
        n, width, height = (int(x or 0) for x in found.groups())
        return cls(n or width * height, width)

    def order(self, tokens: int, width: int) -> np.ndarray:
        """int [tokens]: the order in which the tokens of a picture, `width` of them in a row, are cut into blocks."""
        if not self.tile_width:
            return np.arange(tokens)
        return tile_order(*np.divmod(np.arange(tokens), width), self.tile_width, self.size // self.tile_width)


def tile_order(y: np.ndarray, x: np.ndarray, width: int, height: int) -> np.ndarray:
    """y, x int [n]: rows and columns of the tokens of a picture -> int [n].

    Whole tiles first, from left to right and from top to bottom. Of the others, those above the bottom strip row by row, then the strip itself
    column by column from its right end: what is left lies together.
    """
    if not len(y):
        return np.arange(0)
    y, x = y - y.min(), x - x.min()
    bottom = (y.max() + 1) // height * height
    _, tile, count = np.unique(y // height * (x.max() + 1) + x // width, return_inverse=True, return_counts=True)
    whole = count[tile] == width * height
    strip = ~whole & (y >= bottom)
    group = np.where(whole, 0, np.where(strip, 2, 1))
    keys = (
        np.where(whole, y // height, np.where(strip, -x, y)),
        np.where(whole, x // width, np.where(strip, y, x)),
        np.where(whole, y, 0),
        np.where(whole, x, 0),
    )
    return np.lexsort((*keys[::-1], group))

"""Which tokens of a picture make a block, see docs/design/codec.md."""

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

    Tile by tile, from left to right and from top to bottom: the whole tiles, then what there is of the others.
    """
    if not len(y):
        return np.arange(0)
    y, x = y - y.min(), x - x.min()
    row, column = y // height, x // width
    _, tile, count = np.unique(row * (column.max() + 1) + column, return_inverse=True, return_counts=True)
    return np.lexsort((x, y, column, row, count[tile] != width * height))

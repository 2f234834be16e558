"""The shape of the blocks, and which pictures can be cut into them: decided from the sizes of all pictures before the model looks at one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..codec.cut import BlockShape
from ..format.base_model import BaseModel
from ..format.capsule import GRID_ROPE_TYPES
from .source import Shape, TrainError

DEFAULT_BLOCK = 64  # docs/reference/format-v1.md, "Why these choices"
MIN_BLOCK, MAX_BLOCK = 32, 128
ODD = 0.25  # so large a share of the pictures is left out for the others' sake, and no larger one


def plan(model: BaseModel, shapes: Sequence[Shape], asked: BlockShape | None, say: Callable[[str], None]) -> tuple[BlockShape, list[Shape]]:
    """The blocks, and the pictures that are looked at; says which ones are not, and why. asked: what the user wants. Raises TrainError."""
    if not shapes:
        raise TrainError("no pictures to train on: none of them can be read")
    tokens, width = Counter((s.tokens, s.width) for s in shapes).most_common(1)[0][0]
    block = asked or choose_block(model, tokens, width)
    odd = [s for s in shapes if needs_one_square(model, block, s) and (s.width**2 != s.tokens or s.tokens != tokens)]
    raster = BlockShape(block.size)
    if odd and asked is None and len(odd) > ODD * len(shapes):
        say(f"{len(odd)} of {len(shapes)} pictures are not squares of {tokens} tokens, so the blocks are {raster} instead of {block}: they lose more")
        block, odd = raster, []
    if len(odd) == len(shapes):
        raise TrainError(f"a picture of {tokens} tokens is not a square of one size for all pictures, as tiles need it without M-RoPE: use --block {raster}")
    if tokens % block.size and any(needs_one_square(model, block, s) for s in shapes):
        raise TrainError(f"a picture of {tokens} tokens is no whole number of blocks of {block.size}, as tiles need it without M-RoPE: use --block {raster}, or {choose_block(model, tokens, width)}")
    if odd:
        say(
            f"left out, {len(odd)} of {len(shapes)} pictures: blocks of {block} need squares of {tokens} tokens, "
            f"and {odd[0].name} has {odd[0].tokens}; --block {raster} takes any shape"
        )
    small = [s for s in shapes if s.tokens < block.size and s not in odd]
    if small:
        say(f"left out, {len(small)} of {len(shapes)} pictures: they have fewer tokens than a block of {block.size}, {small[0].name} has {small[0].tokens}")
    left = {s.number for s in (*odd, *small)}
    fitting = [s for s in shapes if s.number not in left]
    if not fitting:
        raise TrainError(f"no pictures to train on: all have fewer tokens than a block of {block.size}, choose a smaller --block")
    return block, fitting


def needs_one_square(model: BaseModel, block: BlockShape, picture: Shape) -> bool:
    """Tiles are told from the number of tokens, unless M-RoPE tells the place of each."""
    return bool(block.tile_width) and not (model.rope_type in GRID_ROPE_TYPES and picture.width)


def choose_block(model: BaseModel, n: int, width: int, wanted: int = DEFAULT_BLOCK) -> BlockShape:
    """Of pictures of n tokens in rows of `width`, 0 = unknown.

    Tiles where the place of a token is known: 8 x 8 if pictures may have any shape, the divisors of the grid nearest to that if it is a square.
    Otherwise the divisor of the number of tokens in 32..128 nearest to `wanted`, so that no picture has a remainder; `wanted` if there is none.
    """
    if model.rope_type in GRID_ROPE_TYPES and width:
        return BlockShape(64, 8)
    sizes = range(MIN_BLOCK, MAX_BLOCK + 1)
    if width * width == n:
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        tiles = [BlockShape(w * h, w) for w in divisors for h in divisors if w * h in sizes and w >= h]
        if tiles:
            return min(tiles, key=lambda b: (abs(b.size - wanted), b.tile_width))
    fits = [BlockShape(size) for size in sizes if n % size == 0]
    return min(fits, key=lambda b: (abs(b.size - wanted), b.size), default=BlockShape(wanted))

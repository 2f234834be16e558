"""Sizes of pictures, for models that take any: whole cells of 28 pixels."""

from __future__ import annotations

import numpy as np

SIDES = range(280, 421, 28)  # pixels; of width and height each: 100 to 225 cells


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height; two in five pictures are square."""
    width, height = (int(side) for side in rng.choice(SIDES, 2))
    return (width, width) if rng.random() < 0.33 else (width, height)


def size_of(seed: int) -> tuple[int, int]:
    """The size that goes with a scene's seed where sizes are mixed."""
    return random_size(np.random.default_rng([seed, 4]))

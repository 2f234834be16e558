"""The embeddings of the images that tests show to models."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def image_rows(seed: int, n: int, n_embd: int) -> np.ndarray:
    """A random image, f64 [n, n_embd]."""
    return np.random.default_rng(seed).standard_normal((n, n_embd))

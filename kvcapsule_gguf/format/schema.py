"""Limits of a capsule file, and the names of its tensors."""

from __future__ import annotations

MAX_FILE = 1 << 30
MAX_KV = 256
MAX_HEADER = 64 << 20
MAX_VALUE = 65504.0  # what the hot cache can hold
MAX_MEAN = 8192.0  # of a mean: what is added to it has to fit as well
MAX_HEADS = 4096
MAX_HEAD = 512
MAX_TIERS = 16
MAX_NEIGHBOURS = 8
MAX_MLP = 1024
INFIX = ".kvcapsule."


def tensor_name(layer: int, short: str) -> str:
    return f"blk.{layer}{INFIX}{short}"

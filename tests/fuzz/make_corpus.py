"""Writes tests/fuzz/corpus/: the smallest capsules and states that have each part of the format. Run it after a change of the format."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import gguf  # noqa: E402
from tiny_gguf import rewrite  # noqa: E402

from kvcapsule_gguf.format.capsule import Base  # noqa: E402
from kvcapsule_gguf.format.tile_capsule import ROWS, TileCapsule, TileLayer, write_tile_capsule  # noqa: E402

STR = gguf.GGUFValueType.STRING


def tile_layer(index: int, d: int, axes: bool) -> TileLayer:
    """Two channels of a key have RoPE; tiers of 2, 16 and 32 bits."""
    tables = []
    for groups in (1 + -(-(d - 2) // 32), -(-d // 32)):
        table = np.repeat(np.array([2, 16, 32], np.uint8), ROWS * groups).reshape(3, 1, ROWS, groups)
        table[0, 0, 0] = 16
        tables.append(table)
    means = np.full((1, d), 0.5, np.float32), np.zeros((1, d), np.float32)
    return TileLayer(index, True, *means, *tables, 1.0, 2.0, np.eye(d, dtype=np.float16)[None] if axes else None)


def tiles(layers: list[TileLayer]) -> TileCapsule:
    return TileCapsule(Base("llama", 4, "0123456789abcdef" * 4, "neox"), 2, [0.0] * 3, layers, provenance={"tool": "fuzz"})


def capsules(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kv = {"general.type": ("mmproj", STR), "adapter.type": None, "general.architecture": ("clip", STR)}
    one = write_tile_capsule(folder / "small.gguf", tiles([tile_layer(0, 2, True)]))
    write_tile_capsule(folder / "layers.gguf", tiles([tile_layer(1, 34, False), tile_layer(3, 4, True)]))
    rewrite(one, folder / "mmproj.gguf", kv=kv, add=[("v.weight", np.ones(4, np.float32))])


def cell(pos: int, x: int = 0, y: int = 0, seqs: list[int] = []) -> bytes:  # noqa: B006
    return struct.pack(f"<iiiI{len(seqs)}i", pos, x, y, len(seqs), *seqs)


def state(spans: list[list[tuple[int, int, int, int]]], slots: list[tuple[int, int, int, list[bytes]]]) -> bytes:
    """spans: vision and pending, (sequence, p0, p1, closed); slots: height, width, tier and cells of each."""
    out = struct.pack("<III", *map(len, spans), len(slots))
    out += b"".join(struct.pack("<iiiI", *span) for group in spans for span in group)
    return out + b"".join(struct.pack("<BBBB", h, w, tier, 0) + b"".join(cells) for h, w, tier, cells in slots)


def states(folder: Path) -> None:
    """The first byte picks the limits, see state.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [cell(i, i % 4, i // 4, [0, 2]) for i in range(8)]
    files = {
        "empty": b"\x00" + state([[], []], []),
        "whole": b"\x00" + state([[(0, 0, 8, 1)], [(3, 8, 9, 0)]], [(2, 4, 9, lines), (1, 3, 0, [cell(-1), cell(9, 0, 0, [3]), cell(-1)])]),
        "last-position": b"\x01" + state([[], []], [(1, 1, 0, [cell(2**31 - 1)])]),  # found by the target `context`: it could not be removed again
        "one-sequence": b"\x01" + state([[(0, 5, 9, 0)], []], [(8, 8, 1, [cell(i) for i in range(64)]), (1, 1, 2, [cell(64)])]),
        "large": b"\x02" + state([[], []], [(8, 1, 3, [cell(i, 0, 0, [255]) for i in range(8)])]),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    capsules(HERE / "corpus" / "capsule")
    states(HERE / "corpus" / "state")

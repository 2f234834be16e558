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

from kvcapsule_gguf.codec.types import row_counts  # noqa: E402
from kvcapsule_gguf.format.capsule import PCA, RETAIN, Base, Capsule, Layer, Tier  # noqa: E402
from kvcapsule_gguf.format.tile_capsule import ROWS, TileCapsule, TileLayer, write_tile_capsule  # noqa: E402
from kvcapsule_gguf.format.writer import write_capsule  # noqa: E402

STR = gguf.GGUFValueType.STRING
N, M, K, H = 8, 4, 2, 2  # block, kept tokens, neighbours, MLP width


def layer(index: int, d: int, retain: bool) -> Layer:
    rng = np.random.default_rng(index)
    out = Layer(
        index, 1, d, d,
        k_mean=rng.standard_normal((1, d)).astype(np.float32),
        v_mean=rng.standard_normal((1, d)).astype(np.float32),
        k_basis=np.eye(N, dtype=np.float32),
        v_basis=np.eye(N, dtype=np.float32),
        k_query_weight=np.ones((1, d), np.float32),
    )  # fmt: skip
    if retain:
        out.kept_count, out.mlp_width = M, H
        out.token_order = rng.permutation(N).astype(np.uint16)
        out.k_gate = np.full((1, N - M, K, d), 0.5, np.float16)
        out.k_neighbours = rng.integers(0, M, (N - M, K)).astype(np.int32)
        out.k_mlp_up = np.ones((1, H, K * d), np.float16)
        out.k_mlp_up_bias = np.zeros((1, H), np.float32)
        out.k_mlp_down = np.ones((1, d, H), np.float16)
    return out


def capsule(layers: list[Layer], rows: list[int], **options) -> Capsule:
    """A tier for each number of f16 rows, the first is faithful."""
    retain = any(x.kept_count for x in layers)
    tiers = [
        Tier("faithful" if i == 0 else f"economy-{i}", [RETAIN if retain and i else PCA] * len(layers),
             [row_counts(f16=n)] * len(layers), [row_counts(f32=1, f16=n - 1)] * len(layers), [0.0] * len(layers))
        for i, n in enumerate(rows)
    ]  # fmt: skip
    base = Base("llama", 4, "0123456789abcdef" * 4)
    return Capsule(base, N, layers, tiers, neighbour_count=K if retain else 0, provenance={"tool": "fuzz"}, **options)


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
    one = write_capsule(folder / "pca.gguf", capsule([layer(0, 2, False)], [8, 4]))
    write_capsule(folder / "retain.gguf", capsule([layer(1, 2, True)], [8, 6], image_tokens=16, block_width=4))
    write_capsule(folder / "layers.gguf", capsule([layer(0, 2, False), layer(3, 4, False)], [8, 6, 4], block_shape="tile", block_width=4, image_tokens=64))
    kv = {"general.type": ("mmproj", STR), "adapter.type": None, "general.architecture": ("clip", STR)}
    rewrite(one, folder / "mmproj.gguf", kv=kv, add=[("v.weight", np.ones(4, np.float32))])
    two = write_tile_capsule(folder / "tiles.gguf", tiles([tile_layer(0, 2, True)]))
    write_tile_capsule(folder / "tiles-layers.gguf", tiles([tile_layer(1, 34, False), tile_layer(3, 4, True)]))
    rewrite(two, folder / "tiles-mmproj.gguf", kv=kv, add=[("v.weight", np.ones(4, np.float32))])


def cell(pos: int, x: int = 0, y: int = 0, seqs: list[int] = []) -> bytes:  # noqa: B006
    return struct.pack(f"<iiiI{len(seqs)}i", pos, x, y, len(seqs), *seqs)


def state(spans: list[list[tuple[int, int, int, int]]], slots: list[list[list[bytes]]]) -> bytes:
    """spans: vision and pending, (sequence, p0, p1, closed); slots: the cells of each slot, economy and faithful."""
    out = struct.pack("<IIII", *map(len, spans), *map(len, slots))
    out += b"".join(struct.pack("<iiiI", *span) for group in spans for span in group)
    return out + b"".join(struct.pack("<Q", 0x1234567890ABCDEF) + b"".join(cells) for pool in slots for cells in pool)


def tile_state(spans: list[list[tuple[int, int, int, int]]], slots: list[tuple[int, int, int, list[bytes]]]) -> bytes:
    """The same of format v2; slots: height, width, tier and cells of each."""
    out = struct.pack("<III", *map(len, spans), len(slots))
    out += b"".join(struct.pack("<iiiI", *span) for group in spans for span in group)
    return out + b"".join(struct.pack("<BBBB", h, w, tier, 0) + b"".join(cells) for h, w, tier, cells in slots)


def states(folder: Path) -> None:
    """The first byte picks the limits, see state.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [cell(i, i % 4, i // 4, [0, 2]) for i in range(N)]
    files = {
        "empty": b"\x00" + state([[], []], [[], []]),
        "whole": b"\x00" + state([[(0, 0, 8, 1)], [(3, 8, 9, 0)]], [[whole], [[cell(-1)] * 7 + [cell(100, 0, 0, [3])]]]),
        "last-position": b"\x01" + state([[], []], [[[cell(2**31 - 1)] * N], []]),  # found by the target `context`: it could not be removed again
        "one-sequence": b"\x01" + state([[(0, 5, 9, 0)], []], [[[cell(i) for i in range(N)]], []]),
        "large": b"\x02" + state([[], []], [[], [[cell(i, 0, 0, [255]) for i in range(16)]]]),
    }
    lines = [cell(i, i % 4, i // 4, [0, 2]) for i in range(8)]
    files |= {
        "tiles-empty": b"\x04" + tile_state([[], []], []),
        "tiles-whole": b"\x04" + tile_state([[(0, 0, 8, 1)], [(3, 8, 9, 0)]], [(2, 4, 9, lines), (1, 3, 0, [cell(-1), cell(9, 0, 0, [3]), cell(-1)])]),
        "tiles-one-sequence": b"\x05" + tile_state([[(0, 5, 9, 0)], []], [(8, 8, 1, [cell(i) for i in range(64)]), (1, 1, 2, [cell(64)])]),
        "tiles-large": b"\x06" + tile_state([[], []], [(8, 1, 3, [cell(i, 0, 0, [255]) for i in range(8)])]),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    capsules(HERE / "corpus" / "capsule")
    states(HERE / "corpus" / "state")

"""Tiles, groups, planes and whole heads of the second form: exact round trips and shapes, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcapsule_gguf.codec.channels import key_groups, plain_groups
from kvcapsule_gguf.codec.head import F16, Head, row_blocks, table_rows
from kvcapsule_gguf.codec.planes import PLANES, code_bytes, pack, unpack
from kvcapsule_gguf.codec.quality import choose, score
from kvcapsule_gguf.codec.registers import mix
from kvcapsule_gguf.codec.rope import pair_index
from kvcapsule_gguf.codec.scale import search
from kvcapsule_gguf.codec.tiles import cut_grid, cut_run, cut_side, inverse, row_order, transform

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("n", range(1, 70))
def test_a_side_is_whole_tiles_and_what_is_left(n):
    cut = cut_side(n)
    assert sum(cut) == n and set(cut[:-1]) <= {8} and 1 <= cut[-1] <= 8


def test_every_token_of_a_grid_is_in_one_tile():
    for height in range(1, 30, 3):
        for width in range(1, 30, 4):
            tiles = cut_grid(height, width)
            assert sorted(np.concatenate([t for *_, t in tiles])) == list(range(height * width))
            for h, w, tokens in tiles:
                y, x = np.divmod(tokens, width)
                assert len(tokens) == h * w and np.ptp(y) == h - 1 and np.ptp(x) == w - 1


def test_a_run_is_cut_in_lines_of_eight():
    assert [(h, w) for h, w, _ in cut_run(150)] == [(8, 8), (8, 8), (2, 8), (1, 6)]
    for n in (1, 8, 63, 64, 150):
        assert np.concatenate([t for *_, t in cut_run(n)]).tolist() == list(range(n))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (8, 4), (1, 3), (1, 1)])
def test_the_transform_is_a_cosine_transform(size):
    h, w = size
    x = RNG.standard_normal((h * w, 3)).astype(np.float32)
    rows = transform(x, h, w)
    assert inverse(rows, h, w) == pytest.approx(x, abs=1e-5)
    for rank in {0, min(1, h * w - 1), h * w // 2, h * w - 1}:
        u, v = divmod(int(row_order(h, w)[rank]), w)
        wave = [math.cos(math.pi * (y + 0.5) * u / h) * math.cos(math.pi * (z + 0.5) * v / w) for y in range(h) for z in range(w)]
        scale = math.sqrt((1 if u == 0 else 2) / h * (1 if v == 0 else 2) / w)
        assert rows[rank] == pytest.approx(scale * np.array(wave) @ x, abs=1e-5)
    smooth = [(y / h) ** 2 + (z / w) ** 2 for y, z in (divmod(int(r), w) for r in row_order(h, w))]
    assert smooth == sorted(smooth) or np.allclose(smooth, sorted(smooth))


@pytest.mark.parametrize("rope", [("norm", 64, 64), ("neox", 72, 72), ("mrope", 128, 128), ("norm", 80, 20), ("none", 33, 0), ("neox", 100, 32)])
def test_groups_hold_every_channel_once_and_pairs_in_two_registers(rope):
    kind, d, rotated = rope
    groups = key_groups(d, kind, rotated)
    channels = np.concatenate([g.ravel() for g in groups])
    assert sorted(channels[channels >= 0]) == list(range(d))
    assert all(g.shape[0] == 2 and g.shape[1] <= 16 for g in groups)
    if rotated:
        pairs = {tuple(p) for p in pair_index(kind, rotated)}
        in_registers = {tuple(p) for g in groups for p in g.T}
        assert pairs <= in_registers


def test_mixing_is_a_hadamard_transform_of_the_registers():
    h2 = np.array([[1, 1], [1, -1]])
    for n, matrix in ((2, h2 / 2**0.5), (4, np.kron(h2, h2) / 2)):
        x = RNG.standard_normal((5, n, 16)).astype(np.float32)
        assert mix(x) == pytest.approx(np.einsum("rs,bsl->brl", matrix, x), abs=1e-6)
        assert mix(mix(x)) == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("shape", [(4, 16), (2, 16), (4, 4), (2, 5), (4, 1)])
def test_planes(bits, shape):
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = RNG.choice([-1, 1], (9, *shape)) if bits == 1 else RNG.integers(low, high + 1, (9, *shape))
    data = pack(codes, bits)
    assert data.shape == (9, code_bytes(bits, shape[0] * shape[1]))
    assert (unpack(data, bits, shape) == codes).all()


def test_where_a_code_lies():
    """A few codes of a block of 64, by hand: element 2 * lane + row, byte (element mod bytes of the plane)."""
    codes = np.zeros((4, 16), int)  # a code c is stored as c + 2^(bits - 1)
    codes[2, 5] = 1  # second row, first register, lane 5: a of element 11
    assert pack(codes, 2)[11] == 0b10_10_10_11 and pack(codes, 2)[10] == 0b10_10_10_10
    assert pack(codes, 4)[11] == 0x89
    codes[3, 8] = 3  # second row, second register, lane 8: b of element 17
    assert pack(codes, 3)[[1, 11]].tolist() == [0b100_1_100_0, 0b100_0_101_0]  # elements 17 and 1; 27 and 11
    assert pack(codes, 3)[16 + 1] == 0b10_11_10_10  # elements 25, 17, 9 and 1
    assert pack(codes, 6)[[11, 17]].tolist() == [0b100001_00, 0b100000_11] and pack(codes, 6)[32 + 1] == 0x88
    assert pack(codes, 8)[11] == 129 and pack(codes, 8)[32 + 17] == 131


def head(d: int = 72, axes: bool = False, seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    groups = key_groups(d, "neox", d)
    table = rng.choice([0, 1, 2, 3, 4, 6, 8], (33, len(groups)))
    table[0] = F16
    turned = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32) if axes else None
    return Head(rng.standard_normal(d).astype(np.float32), groups, table, turned)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 4), (8, 3), (1, 6), (1, 1)])
@pytest.mark.parametrize("axes", [False, True])
def test_a_head_is_what_its_parts_say(size, axes):
    """Every block on its own, with the parts tested above: the same coefficients, and the bytes where the docs say."""
    h, w = size
    x = RNG.standard_normal((2, h * w, 72)).astype(np.float32)
    code = head(axes=axes)
    data = code.encode(x, h, w)
    assert data.dtype == np.uint8 and data.shape == (2, code.size(h, w))
    read = code.load(data, h, w)
    rows = transform(x - code.mean, h, w)
    rows = rows @ code.axes if axes else rows
    used = table_rows(h, w)
    for i, block in enumerate(row_blocks(h * w)):
        for g, group in enumerate(code.groups):
            bits = code.table[used[i], g]
            want = rows[:, block][..., group]
            registers = want.reshape(2, -1, group.shape[1])
            if bits == 0:
                want = np.zeros_like(want)
            elif bits == F16:
                want = mix(mix(registers).astype(np.float16).astype(np.float32)).reshape(want.shape)
            else:
                scale, codes = search(mix(registers).reshape(2, -1), int(bits))
                want = mix((scale[:, None] * codes).reshape(registers.shape)).reshape(want.shape)
            assert (read[:, block][..., group] == want).all()
    assert code.decode(data, h, w) == pytest.approx(inverse(read @ code.axes.T if axes else read, h, w) + code.mean, abs=1e-5)


def test_an_exact_table_is_nearly_exact():
    code = head()
    exact = Head(code.mean, code.groups, np.full_like(code.table, 8))
    for size in ((8, 8), (6, 5), (1, 7)):
        x = RNG.standard_normal((1, size[0] * size[1], 72)).astype(np.float32)
        assert np.square(exact.decode(exact.encode(x, *size), *size) - x).mean() < 2e-4


def test_short_tiles_use_the_whole_tile_s_table():
    assert table_rows(8, 8).tolist() == list(range(33))
    for h in range(1, 9):
        for w in range(1, 9):
            used = table_rows(h, w)
            assert used[0] == 0 and used.min() >= 0 and used.max() <= 32 and len(used) == len(row_blocks(h * w))


def test_values_of_any_length():
    for d in (32, 33, 80, 512):
        groups = plain_groups(d)
        code = Head(np.zeros(d, np.float32), groups, np.full((33, len(groups)), 6))
        x = RNG.standard_normal((1, 64, d)).astype(np.float32)
        assert np.square(code.decode(code.encode(x, 8, 8), 8, 8) - x).mean() < 2e-3


def test_the_tier_of_a_tile():
    error = np.array([[4.0, 2], [1, 1], [0.5, 0.1]])  # three tiers of one tile, keys and values of a layer
    rival, energy = np.array([1.0, 2]), np.array([100.0, 100])
    assert score(error, rival, energy) == pytest.approx([2.5, 0.75, 0.275])
    assert score(error, rival * 1e6, energy) == pytest.approx([1, 1 / 3, 0.1])  # q4_0 fails: the energy counts
    assert choose(score(error, rival, energy), 1) == 1 and choose(score(error, rival, energy), 0.1) == -1
    assert choose(score(error * np.nan, rival, energy), 1e9) == -1

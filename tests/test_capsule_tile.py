"""Tiles of format v2 in plain C++ (ggml-capsule/): the bytes, coefficients and tokens of the numpy reference."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import native_code
import numpy as np
import pytest
from whole_tiles import Native, whole_tiles

from kvcapsule_gguf.codec.channels import gather, key_groups, plain_groups
from kvcapsule_gguf.codec.head import F16, Head, row_blocks, table_rows
from kvcapsule_gguf.codec.registers import mix
from kvcapsule_gguf.codec.scale import BITS, search
from kvcapsule_gguf.codec.tiles import row_order

RNG = np.random.default_rng(16)
HEADS = [(32, 32, 1), (72, 72, 1), (80, 20, 0), (96, 96, 0), (100, 32, 1), (128, 128, 0), (128, 0, 0), (33, 0, 0), (512, 256, 1)]  # d, with RoPE, halves
SHAPES = [(8, 8), (8, 3), (5, 7), (1, 6), (1, 1)]
KINDS = ("normal", "heavy", "tiny", "huge", "zero", "loud channel")


@pytest.fixture(scope="module")
def lib(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(native_code.tiles("capsule_tile", tmp_path_factory.mktemp("tile"))))


def at(x: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if x is None else x.ctypes.data_as(ctypes.c_void_p)


def values(kind: str, *shape: int) -> np.ndarray:
    x = RNG.standard_normal(shape)
    if kind == "heavy":
        x = RNG.standard_t(2, shape)
    elif kind == "loud channel":
        x[..., x.shape[-1] // 3] += 23
    return (x * {"tiny": 2.0**-20, "huge": 1e36, "zero": 0}.get(kind, 1)).astype(np.float32)


def code(head: tuple[int, int, int], axes: bool = False) -> Head:
    d, rotated, halves = head
    groups = key_groups(d, "neox" if halves else "norm", rotated) if rotated else plain_groups(d)
    table = RNG.choice([0, *BITS], (33, len(groups))).astype(np.uint8)
    table[0] = F16
    table[RNG.random(table.shape) < 0.05] = F16
    turned = np.ascontiguousarray(np.linalg.qr(RNG.standard_normal((d, d)))[0].astype(np.float32)) if axes else None
    return Head(RNG.standard_normal(d).astype(np.float32), groups, table, turned)


@pytest.mark.parametrize("head", HEADS)
def test_channels(lib, head):
    d, rotated, halves = head
    groups = code(head).groups
    out = np.empty((len(groups), 2, 16), np.int32)
    assert lib.channels(*head, at(out)) == len(groups)
    for got, want in zip(out, groups):
        assert (got[:, : want.shape[1]] == want).all() and (got[:, want.shape[1] :] == -1).all()


def test_orders_of_rows(lib):
    for h in range(1, 9):
        for w in range(1, 9):
            rows, used = np.empty(h * w, np.uint8), np.empty(1 + h * w // 2, np.uint8)
            lib.order(h, w, at(rows), at(used))
            assert (rows == row_order(h, w)).all() and (used == table_rows(h, w)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_the_reference_s_codes(lib, bits, kind):
    for n in (64, 32, 10, 1):
        x = values(kind, 100, n)
        scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
        lib.search(at(x), len(x), n, bits, at(scales), at(codes))
        want = search(x, bits)
        assert (scales == want[0]).all() and (codes == want[1]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_the_reference_s(lib, head, shape):
    """Coefficients within 1e-6, the same bytes for the same coefficients, what is read back within 1e-6."""
    h, w = shape
    d = head[0]
    for kind in KINDS if d < 100 else ("normal", "loud channel"):
        for axes in (False, True) if d < 100 else (False,):
            c = code(head, axes)
            x = values(kind, h * w, d)
            rows, want = np.empty((h * w, d), np.float32), c.rows(x, h, w)
            lib.rows(*head, at(c.mean), at(c.axes), h, w, at(x), at(rows))
            size = np.sqrt(np.square(want, dtype=np.float64).mean()) + 1e-30
            assert np.abs(rows - want).max() <= 1e-6 * np.abs(want).max() + 1e-6 * size
            assert lib.size(*head, at(c.table), h, w) == c.size(h, w)
            stored, again = c.store(want, h, w), np.full(c.size(h, w) + 16, 0xA5, np.uint8)
            lib.store(*head, at(c.table), h, w, at(np.ascontiguousarray(want)), at(again))
            assert (again[: stored.size] == stored).all() and (again[stored.size :] == 0xA5).all()
            back = np.empty((h * w, d), np.float32)
            lib.load(*head, at(c.table), h, w, at(stored), at(back))
            assert (back == c.load(stored, h, w)).all()
            lib.read(*head, at(c.mean), at(c.axes), at(c.table), h, w, at(stored), at(back))
            decoded = c.decode(stored, h, w)
            assert np.abs(back - decoded).max() <= 1e-6 * (np.abs(decoded).max() + np.abs(c.mean).max())


@pytest.mark.parametrize("codec", ["learned", "retain", "retain with MLP"])
@pytest.mark.parametrize("head", HEADS)
def test_whole_tiles_with_a_transform_are_the_reference_s(lib, head, codec):
    """As above. Codes of what is left of a token may differ by rounding, so bytes are compared for the same rows."""
    d = head[0]
    c = code(head, axes=codec == "learned" and d < 100)
    tiles = whole_tiles(codec.split()[0], 3, c.groups, c.groups, 5 if "MLP" in codec else 0, RNG)["k"]
    native = Native.from_buffer_copy(tiles.native)
    lanes = 3 * (64 - native.n_kept) * native.n_near * 16 * len(c.groups)
    if native.n_near:  # of the last head
        native.gates += lanes // 3 * 2 * 4
    if native.n_mlp:
        native.mlp_up, native.mlp_bias, native.mlp_down = (
            address + array.nbytes // 3 * 2 for address, array in ((getattr(native, n), tiles.arrays[n]) for n in ("mlp_up", "mlp_bias", "mlp_down"))
        )
    c = replace(c, whole=tiles.head(2))
    for kind in ("normal", "loud channel"):
        x = values(kind, 64, d)
        rows, want = np.empty((64, d), np.float32), c.rows(x, 8, 8)
        lib.rows_whole(ctypes.byref(native), *head, at(c.mean), at(c.axes), at(c.table), at(x), at(rows))
        assert np.abs(rows - want).max() <= 3e-6 * np.abs(want).max()
        stored, again = c.store(rows, 8, 8), np.empty(c.size(8, 8), np.uint8)
        lib.store(*head, at(c.table), 8, 8, at(rows), at(again))
        assert (again == stored).all()
        back, decoded = np.empty((64, d), np.float32), c.decode(stored, 8, 8)
        lib.read_whole(ctypes.byref(native), *head, at(c.mean), at(c.axes), at(c.table), at(stored), at(back))
        assert np.abs(back - decoded).max() <= 2e-6 * (np.abs(decoded).max() + np.abs(c.mean).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_wrong_numbers_are_stored_as_finite_ones(lib, bad):
    head = (96, 96, 0)
    c, x = code(head), values("normal", 64, 96)
    x[::7, ::5] = bad
    with np.errstate(invalid="ignore"):
        stored = c.store(x, 8, 8)
    again = np.empty_like(stored)
    lib.store(*head, at(c.table), 8, 8, at(x), at(again))
    assert (again == stored).all() and np.isfinite(c.load(stored, 8, 8)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [(72, 72, 1), (128, 128, 0)])
def test_errors_are_those_of_the_stored_blocks(lib, head, shape):
    h, w = shape
    c, bits = code(head), np.array([0, *BITS, F16], np.uint8)
    rows = values("heavy", h * w, head[0])
    errors = np.empty((1 + h * w // 2, len(c.groups), len(bits)), np.float32)
    lib.errors(*head, h, w, at(rows), len(bits), at(bits), at(errors))
    for i, block in enumerate(row_blocks(h * w)):
        for g, group in enumerate(c.groups):
            x = mix(gather(rows[block], group).reshape(-1, group.shape[1])).astype(np.float64)
            for b, got in zip(bits, errors[i, g]):
                if b == 0:
                    y = np.zeros_like(x)
                elif b == F16:
                    y = x.astype(np.float16).astype(np.float64)
                else:
                    scale, codes = search(x.reshape(1, -1).astype(np.float32), int(b))
                    y = (scale[0] * codes).reshape(x.shape).astype(np.float64)
                assert got == pytest.approx(np.square(x - y).sum(), rel=1e-4, abs=1e-12 * np.square(x).sum())

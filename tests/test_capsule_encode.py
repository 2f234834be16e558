"""GGML_OP_CAPSULE from hot cells to rows of slots, and the errors that the guard asks for, on the CPU backend against numpy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
from capsule_op import TIER_1, Data, Graph, Setting, V, angles, ggml, graph, params, rotate
from test_capsule_op import BASE, HEADS, RETAIN, ROWS, of_rows

from kvcapsule_gguf.codec.guard import FLOOR, token_ratio
from kvcapsule_gguf.codec.pca import decode_pca, encode_pca
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.codec.retain import decode_retain, encode_retain
from kvcapsule_gguf.codec.rope import apply_rope
from kvcapsule_gguf.codec.rows import decode_rows, encode_rows, round_trip, split_counts
from kvcapsule_gguf.codec.types import ROW_TYPES, RowCounts, row_counts, rows_bytes, total_rows

BLOCKS = 3
SLOTS = (4, 0, 2)  # of the blocks, in a pool of five
HALF = 0.6  # share of the last block that has tokens


@dataclass
class Cells:
    """K or V of some blocks in a cache with other cells between them. x f32 [blocks, heads, N, d] as read back, without RoPE, the mean where there is no token."""

    data: Data
    is_v: bool
    tier: int
    cells: np.ndarray  # uint8, as the type of the cache
    index: np.ndarray  # i32 [blocks, N + 1]
    angles: np.ndarray  # f32 [blocks, N, n_rot]
    x: np.ndarray

    @classmethod
    def of(cls, s: Setting, tier: int, is_v: bool) -> Cells:
        data = Data.of(s)
        rng = np.random.default_rng(s.seed + 1)
        d, n_rot, n = (s.d_v, 0, 64) if is_v else (s.d_k, s.n_rot, None)
        mean = data.v_mean if is_v else data.k_mean
        cached = rng.standard_normal((BLOCKS * s.N + 7, s.heads, d)).astype(np.float32) * 2
        index = rng.permutation(len(cached))[: BLOCKS * s.N].reshape(BLOCKS, s.N)
        index[-1, round(HALF * s.N) :] = -1
        pos = rng.integers(0, 500, (BLOCKS, s.N))

        cached = rotate(cached, n) if s.rotated else cached
        raw = ENCODE[s.cache](cached.reshape(len(cached), -1).T if is_v and s.v_trans else cached.reshape(len(cached), -1))
        seen = DECODE[s.cache](raw, len(cached) if is_v and s.v_trans else s.heads * d)
        seen = (seen.T if is_v and s.v_trans else seen).reshape(cached.shape)
        seen = rotate(seen, n) if s.rotated else seen

        x = seen[index].transpose(0, 2, 1, 3)
        if n_rot:
            x = np.stack([apply_rope(b, p, rope_type=s.rope, n=n_rot, inverse=True) for b, p in zip(x, pos, strict=True)])
        x = np.where(index[:, None, :, None] >= 0, x, mean[:, None]).astype(np.float32)
        turn = angles(-pos, s) if n_rot else np.zeros(0, np.float32)
        return cls(data, is_v, tier, raw, np.concatenate([index, np.array(SLOTS)[:, None]], 1).astype(np.int32), turn, x)

    @property
    def rows(self):
        return (self.data.s.rows_v if self.is_v else self.data.s.rows_k)[self.tier]

    @property
    def constants(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and basis."""
        return (self.data.v_mean, self.data.v_basis) if self.is_v else (self.data.k_mean, self.data.k_basis)

    @property
    def retained(self) -> bool:
        return not self.is_v and self.data.s.retain[self.tier]

    def encoded(self) -> np.ndarray:
        """uint8 [blocks, heads, bytes], by numpy."""
        return encode_retain(self.x, self.data.retain, self.rows) if self.retained else encode_pca(self.x, *self.constants, self.rows)

    def decoded(self, data: np.ndarray) -> np.ndarray:
        return decode_retain(data, self.data.retain, self.rows) if self.retained else decode_pca(data, *self.constants, self.rows)

    def truth(self, data: np.ndarray) -> np.ndarray:
        """f32 [blocks, heads, R, d] before it is stored; residuals are those of the kept rows in data."""
        total = total_rows(self.rows)
        if not self.retained:
            mean, basis = self.constants
            return np.matmul(basis[:total], self.x - mean[:, None])
        retain, d = self.data.retain, self.x.shape[-1]
        m = retain.kept
        kept = split_counts(self.rows, m)[0]
        rows = self.x[..., retain.order[:total], :]
        rows[..., m:, :] -= retain.predict(decode_rows(data[..., : rows_bytes(kept, d)], kept, d))[..., : total - m, :]
        return rows

    def nodes(self, g: Graph) -> tuple[int, int]:
        """Encode, and the errors of what it wrote."""
        s = self.data.s
        p = params(s, (V if self.is_v else 0) | (TIER_1 if self.tier else 0))
        size = ggml().ggml_capsule_slot_size(ctypes.byref(p), self.tier)
        slots = g.tensor(np.full((5, size), 0xA5, np.uint8), "i8", 5 * size)
        width, n = s.heads * self.x.shape[-1], BLOCKS * s.N + 7
        cells = g.tensor(self.cells, s.cache, *((n, width) if self.is_v and s.v_trans else (width, n)))
        index = g.tensor(self.index, "i32", *self.index.shape[::-1])
        turn = g.tensor(self.angles, "f32", *self.angles.shape[::-1]) if self.angles.size else None
        weights = g.tensor(self.data.weights(), "i32", self.data.weights().size)
        encode = ggml().ggml_capsule_encode(g.context, ctypes.byref(p), slots, cells, index, turn, weights)
        fits = self.x.shape[-1] % 32 == 0
        return encode, ggml().ggml_capsule_errors(g.context, ctypes.byref(p), encode, cells, index, turn, weights) if fits else 0

    def run(self, threads: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 [blocks, heads, bytes] of the rows, f32 [blocks, heads, N, 3]."""
        s = self.data.s
        with graph() as g:
            encode, errors = self.nodes(g)
            found = g.run(errors, np.float32, threads).reshape(BLOCKS, s.heads, s.N, 3) if errors else None
            slots = g.run(encode, np.uint8, threads).reshape(5, -1)
        assert (np.delete(slots, SLOTS, 0) == 0xA5).all()  # nobody else's
        sizes = [s.heads * (n + (-n % 4 if rows[0] else 0)) for n, rows in ((rows_bytes(self.rows_of(v), s.d_v if v else s.d_k), self.rows_of(v)) for v in (False, True))]
        offset = sizes[0] + -sizes[0] % 4 if self.is_v else 0
        part = slots[list(SLOTS), offset : offset + sizes[self.is_v]].reshape(BLOCKS, s.heads, -1)
        return part[..., : rows_bytes(self.rows, self.x.shape[-1])], found

    def rows_of(self, is_v: bool):
        return (self.data.s.rows_v if is_v else self.data.s.rows_k)[self.tier]


def both(s: Setting) -> list[Cells]:
    return [Cells.of(s, tier, is_v) for tier in range(2) for is_v in (False, True)]


def compare(s: Setting) -> None:
    for c in both(s):
        found, errors = c.run()
        same_rows(c, found)
        if errors is not None:
            same_errors(c, found, errors)


def same_rows(c: Cells, found: np.ndarray) -> None:
    """The bytes are those of numpy, but for the few blocks of values where a sum in another order tips a rounding: these are as good."""
    d = c.x.shape[-1]
    truth = c.truth(found)
    ours, wanted = (decode_rows(x, c.rows, d) for x in (found, encode_rows(truth, c.rows)))
    first = 0
    for row_type, n in zip(ROW_TYPES, c.rows, strict=True):
        x, y, z = (rows[..., first : first + n, :] for rows in (ours, wanted, truth))
        first += n
        if not row_type.quantized:
            assert np.abs(x - y).max(initial=0) <= (2e-5 if row_type.name == "f32" else 1e-3 * np.abs(y).max(initial=0))
            continue
        # as they are stored: rotated
        x, y, z = (rotate(rows).reshape(-1, 64 if row_type.name == "q2_0" else 32) for rows in (x, y, z))
        off = np.abs(x - y).max(1, initial=0) > 1e-4
        assert off.sum() <= max(1, 0.02 * len(off))
        loss = [np.square(rows[off] - z[off]).sum(1) for rows in (x, y)]
        assert (np.abs(loss[0] - loss[1]) <= 0.2 * loss[1]).all()  # the largest change: another f16 scale of q8_0
    same = (found == c.encoded()).mean() if found.size else 1
    assert same > 0.99 or c.rows[0] or c.rows[1]  # every byte of a float may be another one


def same_errors(c: Cells, found: np.ndarray, errors: np.ndarray) -> None:
    """Of the very bytes that were written; the score that the guard makes of them."""
    s = c.data.s
    weight = None if c.is_v else c.data.query_weight
    there = c.index[:, None, : s.N] >= 0
    assert (errors[~np.broadcast_to(there, errors.shape[:3])] == 0).all()
    x_hat = c.decoded(found)
    rival = round_trip(c.x, row_counts(q4_0=s.N))
    w = 1 if weight is None else weight[:, None]
    noise = 1e-9 * (np.square(c.x) * w).sum(-1).max()  # of sums in f32
    for i, e in enumerate((x_hat - c.x, rival - c.x, c.x)):
        wanted = (np.square(e) * w).sum(-1) * there
        off = np.abs(errors[..., i] - wanted) > (1e-5 if i == 2 else 1e-3) * wanted.max() + noise
        assert off.mean() <= (0.02 if i == 1 else 0)  # a value halfway between two codes of q4_0
    slot, q4, energy = errors.sum(1)[:-1].transpose(2, 0, 1)  # whole blocks
    score = (slot / np.maximum(q4, FLOOR * energy.mean(-1, keepdims=True))).max(-1)
    assert np.allclose(score, token_ratio(c.x, x_hat, weight).max(-1)[:-1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("head", "rows"), ROWS)
def test_every_row_type(head, rows):
    compare(of_rows(HEADS[head], rows))


MIXED = of_rows(HEADS[128], "mixed")
CASES = {
    "norm": replace(MIXED, rope="norm"),
    "norm, part of the head": replace(MIXED, rope="norm", n_rot=32),
    "no rope": replace(MIXED, n_rot=0),
    "f16 cache": replace(MIXED, cache="f16"),
    "q8_0 cache": replace(MIXED, cache="q8_0"),
    "rotated q8_0 cache": replace(MIXED, cache="q8_0", rotated=True),
    "rotated q4_0 cache": replace(MIXED, cache="q4_0", rotated=True),
    "transposed V": replace(MIXED, v_trans=True, cache="f16"),
    "odd block": replace(BASE, N=13, rows_k=(row_counts(q8_0=2, q4_0=5, q2_0=3),) * 2, rows_v=(row_counts(f16=1, q4_0=5, q2_0=7),) * 2),
    "a usual block": replace(of_rows(replace(HEADS[128], N=64), "mixed"), heads=1),
    "128 tokens": replace(of_rows(replace(HEADS[128], N=128), "mixed"), heads=1),
}


def retained(economy: RowCounts, faithful: RowCounts = row_counts(q8_0=16), **changes: object) -> Setting:
    return replace(RETAIN, rows_k=(economy, faithful), **changes)


RETAINED = {
    "retain": retained(row_counts(q8_0=2, q4_0=7, q2_0=7)),  # kept tokens and residuals in rows of one type
    "retain, f32": retained(row_counts(f32=5), row_counts(f32=16)),
    "retain, f16": retained(row_counts(f16=7, q4_0=3), row_counts(f16=16)),
    "retain, q2_0": retained(row_counts(q4_0=3, q2_0=13)),
    "retain, no residuals": retained(row_counts(q4_0=5)),
    "retain, a residual": retained(row_counts(q8_0=1, q4_0=4, q2_0=1)),
    "retain, every token kept": retained(row_counts(q8_0=4, q4_0=12), kept=16, mlp=0),
    "retain without MLP": retained(row_counts(q4_0=8, q2_0=8), mlp=0),
    "retain in one tier": retained(row_counts(q4_0=5, q2_0=11), retain=(True, False)),
    "retain, norm, part of the head": retained(row_counts(q4_0=5, q2_0=11), rope="norm", n_rot=32),
    "retain, rotated q8_0 cache": retained(row_counts(q4_0=5, q2_0=11), cache="q8_0", rotated=True),
    "retain, heads of 96": retained(row_counts(q4_0=9), row_counts(q8_0=16), d_k=96),
    "retain, a usual block": replace(HEADS[128], N=64, heads=1, retain=(True, True), kept=26, neighbours=2, mlp=16, rows_k=(row_counts(q4_0=26, q2_0=38), row_counts(q8_0=26, q4_0=38))),
}
CASES |= RETAINED


@pytest.mark.parametrize("name", CASES)
def test_geometries(name):
    compare(CASES[name])


def test_q2_0_is_the_search_of_the_reference():
    """Rows that go through no sum: with the identity as basis and no mean the bytes are equal, also those of blocks that are (nearly) nothing."""
    s = replace(BASE, N=16, rows_k=(row_counts(q2_0=16),) * 2, n_rot=0)
    c = Cells.of(s, 0, False)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BLOCKS, s.heads, s.N, s.d_k)).astype(np.float32) ** 3
    rows[:, :, :4] *= np.float32([0, 1e-7, 1e-3, 1e4])[:, None]
    rows[:, :, 4] = rng.integers(-2, 3, rows[:, :, 4].shape)  # ties
    c.x, c.index[-1, : s.N] = rows, c.index[0, : s.N]
    c.data.k_mean[:], c.data.k_basis[:] = 0, np.eye(s.N)
    cached = np.zeros((BLOCKS * s.N + 7, s.heads, s.d_k), np.float32)
    c.index[:, : s.N] = np.arange(BLOCKS * s.N).reshape(BLOCKS, s.N)
    cached[: BLOCKS * s.N] = rows.swapaxes(1, 2).reshape(-1, s.heads, s.d_k)
    c.cells = ENCODE["f32"](cached.reshape(len(cached), -1))
    found, _ = c.run()
    same = (found == encode_rows(rows, c.rows)).reshape(-1, 18).all(1)
    assert same.mean() > 0.98  # the Hadamard transform rounds on its own


def test_the_threads_of_the_cpu_do_not_matter():
    for c in both(MIXED):
        one, three = c.run(), c.run(threads=3)
        assert (one[0] == three[0]).all() and (one[1] == three[1]).all()

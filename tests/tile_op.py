"""GGML_OP_CAPSULE through ctypes on the CPU backend, and what numpy says about the same slots.

A `Setting` names a geometry; `Data` draws tables, slots (encoded by the numpy codec), positions, hot cells, masks and queries for it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import native_code
import numpy as np
from ggml_graph import TYPES, Graph, ggml, graph
from whole_tiles import whole_tiles

from kvcapsule_gguf.codec.channels import key_groups, plain_groups
from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.head import F16, Head
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.codec.rope import angles, apply_rope
from kvcapsule_gguf.codec.tiles import cut_grid, cut_run

V, V_TRANS, NORM, ROT_K, ROT_V, WHOLE = (1 << i for i in range(6))  # enum ggml_capsule_flag
BITS = (0, 1, 2, 3, 4, 6, 8, F16)
UNIT = 64
BASE = 10000.0


@dataclass(frozen=True)
class Setting:
    """grids: (height, width) of the images; height 0: a run without a grid. rope: none, norm, neox or mrope. rotated: a hot cache with Hadamard-rotated K and V.
    exact: all blocks in f16, so that only sums differ. sequences: images belong to them in turn. bent: a token of the first image lies elsewhere."""

    grids: tuple[tuple[int, int], ...] = ((16, 16), (9, 13))
    heads: int = 2
    gqa: int = 2
    d_k: int = 64
    d_v: int = 64
    n_rot: int = 64
    rope: str = "neox"
    sections: tuple[int, int, int, int] = (0, 0, 0, 0)
    tokens: int = 2
    n_kv: int = 40
    cache: str = "f32"
    mask: str = "f32"
    v_trans: bool = False
    rotated: bool = False
    axes: bool = True
    exact: bool = False
    scale: float = 1.0  # of the angles (YaRN's mscale)
    sequences: int = 1
    ragged: float = 0.0  # share of the columns that no query sees
    bent: bool = False
    seed: int = 0
    codec: str = "dct"  # of whole tiles: dct, learned or retain
    mlp: int = 0  # hidden units of retain's key MLP

    @property
    def flags(self) -> int:
        chosen = {V_TRANS: self.v_trans, NORM: self.rope == "norm", ROT_K: self.rotated, ROT_V: self.rotated, WHOLE: self.codec != "dct"}
        return sum(flag for flag, on in chosen.items() if on)

    @property
    def channels(self) -> tuple[int, int, int]:
        return self.d_k, self.rotated_channels, int(self.rope != "norm")

    @property
    def rotated_channels(self) -> int:
        return 0 if self.rope == "none" else self.n_rot


class Params(ctypes.Structure):
    """struct ggml_capsule_tile_params."""

    _fields_ = [
        ("op", ctypes.c_uint16), ("flags", ctypes.c_uint16), ("scale", ctypes.c_float),
        *((name, ctypes.c_uint16) for name in ("n_rot", "n_head_kv", "d_k", "d_v")), ("n_rows", ctypes.c_uint32), ("n_parts", ctypes.c_uint32),
    ]  # fmt: skip


@cache
def helper(folder: Path) -> Any:
    """tests/native/tile_op.cpp."""
    source = native_code.ROOT / "patches" / "files"
    flags = [*(f"-I{source / inside}" for inside in ("src", "ggml/src", "ggml/include")), f"-I{native_code.source() / 'ggml' / 'include'}"]
    return ctypes.CDLL(str(native_code.tiles("tile_op", folder, *flags, str(source / "src/capsule/format/forms.cpp"))))


def at(x: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if x is None else x.ctypes.data_as(ctypes.c_void_p)


class Data:
    """keys, values: f32 [columns, H, d] of the slots as decoded, keys with RoPE; visible bool [tokens, n_kv + columns]."""

    def __init__(self, s: Setting, lib: Any):
        self.s, self.lib = s, lib
        rng = np.random.default_rng(s.seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        self.k_mean, self.v_mean = normal(s.heads, s.d_k), normal(s.heads, s.d_v)
        self.axes = np.stack([np.linalg.qr(normal(s.d_v, s.d_v))[0] for _ in range(s.heads)]).astype(np.float32) if s.axes else None
        groups_k = key_groups(s.d_k, s.rope, s.rotated_channels) if s.rotated_channels else plain_groups(s.d_k)
        groups_v = plain_groups(s.d_v)
        self.k_table, self.v_table = (self._tables(rng, len(groups)) for groups in (groups_k, groups_v))
        self.whole = whole_tiles(s.codec, s.heads, groups_k, groups_v, s.mlp, rng)
        self.tiles = [(i, tile) for i, (h, w) in enumerate(s.grids) for tile in (cut_grid(h, w) if h else cut_run(w))]
        tiers = rng.integers(0, 2, len(self.tiles))
        self.forms = sorted({(int(t), h, w) for t, (_, (h, w, _)) in zip(tiers, self.tiles)})
        sizes = np.zeros(len(self.forms), np.int64)
        lib.make_forms.restype, lib.pack_forms.restype = ctypes.c_void_p, ctypes.c_int64
        self.handle = ctypes.c_void_p(
            lib.make_forms(s.heads, s.d_k, s.d_v, s.rotated_channels, int(s.rope != "norm"), 2, at(self.k_mean), at(self.v_mean), at(self.axes),
                           ctypes.byref(self.whole["k"].native), ctypes.byref(self.whole["v"].native),
                           at(self.k_table), at(self.v_table), len(self.forms), at(np.array(self.forms, np.int32)), at(sizes))
        )  # fmt: skip
        self.packed = np.zeros(lib.pack_forms(self.handle, None), np.uint8)
        lib.pack_forms(self.handle, at(self.packed))

        order = rng.permutation(len(self.tiles))  # slots lie in the pool in an order of their own
        bytes_, keys, values = {}, [], []
        for i, (tier, (_, (h, w, _))) in enumerate(zip(tiers, self.tiles)):
            form = self.forms.index((int(tier), h, w))
            parts, k_hat, v_hat = [], [], []
            for kind, mean, table, groups, axes, out in (
                ("k", self.k_mean, self.k_table, groups_k, None, k_hat), ("v", self.v_mean, self.v_table, groups_v, self.axes, v_hat)
            ):  # fmt: skip
                for head in range(s.heads):
                    code = Head(mean[head], groups, table[tier, head], None if axes is None else axes[head], self.whole[kind].head(head))
                    data = code.encode(normal(h * w, len(mean[head])), h, w)
                    parts.append(data)
                    out.append(code.decode(data, h, w))
            no_step = np.zeros(8, np.uint8)  # read in plain C++
            slot = np.concatenate([x for k, v in zip(parts[: s.heads], parts[s.heads :]) for x in (no_step, k, v)])
            assert slot.size == sizes[form], "the layout of a slot"
            bytes_[i] = np.pad(slot, (0, -slot.size % UNIT))
            keys.append(np.stack(k_hat, 1))
            values.append(np.stack(v_hat, 1))
        offset, offsets = 0, np.zeros(len(self.tiles), np.int64)
        for i in order:
            offsets[i] = offset // UNIT
            offset += bytes_[i].size
        self.pool = np.concatenate([*(bytes_[i] for i in order), np.full(UNIT, 0xFF, np.uint8)])

        self._positions(rng)
        self.values = np.concatenate(values)
        self.keys = np.concatenate(keys)
        if s.rotated_channels:
            turned = apply_rope(self.keys.swapaxes(0, 1), self.positions, rope_type=s.rope, freq_base=BASE, n=s.n_rot, sections=s.sections)
            self.keys = turned.swapaxes(0, 1).copy()
            self.keys[..., : s.n_rot] *= np.float32(s.scale)
        first = np.cumsum([0, *(h * w for _, (h, w, _) in self.tiles)])
        columns = int(first[-1])
        self.slots = np.concatenate([
            np.stack([offsets, [self.forms.index((int(t), h, w)) for t, (_, (h, w, _)) in zip(tiers, self.tiles)], self.rope_of, first[:-1]], 1).ravel(),
            len(self.tiles) + np.array(self.row_of),
        ]).astype(np.int32)  # fmt: skip

        self.q, self.hot_k, self.hot_v = normal(s.tokens, s.heads * s.gqa, s.d_k), normal(s.n_kv, s.heads, s.d_k), normal(s.n_kv, s.heads, s.d_v)
        self.visible = rng.random((s.tokens, s.n_kv + columns)) >= s.ragged
        owner = np.repeat([i % s.sequences for i, _ in self.tiles], np.diff(first))
        self.visible[:, s.n_kv :] &= owner[None] == np.arange(s.tokens)[:, None] % s.sequences
        cold = self.visible[:, s.n_kv :]
        counts = np.add.reduceat(cold, first[:-1], 1)
        self.seen = np.where(counts == 0, 0, np.where(counts == np.diff(first), 1, 2)).astype(np.int8)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.lib.free_forms(self.handle)

    def _tables(self, rng: np.random.Generator, groups: int) -> np.ndarray:
        """uint8 [2 tiers, H, 33, groups]; some blocks are not stored, the constant row is f16."""
        table = rng.choice(BITS, (2, self.s.heads, 33, groups)).astype(np.uint8)
        table[..., 0, :] = F16
        return np.full_like(table, F16) if self.s.exact else table

    def _positions(self, rng: np.random.Generator) -> None:
        """positions int [columns, 4]; the angles of slots and patterns as the op reads them."""
        s, first = self.s, 5
        positions, patterns = [], []
        self.row_of, self.rope_of, ropes, rows, starts = [], [], [], [], []
        for i, (h, w, tokens) in [(i, tile) for i, tile in self.tiles]:
            height, width = s.grids[i]
            y, x = np.divmod(tokens, width) if height else (np.zeros(len(tokens), int), tokens)
            start = first + 700 * i
            pos = np.stack([np.full(len(tokens), start), start + y, start + x, np.zeros(len(tokens), int)], 1) if s.rope == "mrope" and height else (
                np.repeat((start + tokens)[:, None], 4, 1) * [1, 1, 1, 0]
            )  # fmt: skip
            if s.bent and not positions:
                pos[1] += 3
            pattern = pos - pos[0]
            key = (h, w, pattern.tobytes())
            if key not in patterns:
                patterns.append(key)
                rows.append(pattern)
                ropes.append((pattern[1] if w > 1 else 0 * pattern[0], pattern[w] if h > 1 else 0 * pattern[0]))
            found = patterns.index(key)
            self.rope_of.append(found)
            self.row_of.append(sum(len(r) for r in rows[:found]))
            starts.append(pos[0])
            positions.append(pos)
        self.positions = np.concatenate(positions)
        self.n_rows = len(starts) + sum(map(len, rows))
        if not s.rotated_channels:
            self.angles = None
            return
        n_angle, n_rope = self.lib.angle_floats(*s.channels), self.lib.rope_floats(*s.channels)
        angle = lambda pos: np.ascontiguousarray(angles(np.atleast_2d(pos), s.rope, s.n_rot, BASE, s.sections))  # noqa: E731
        out = np.zeros(self.n_rows * n_angle + len(ropes) * n_rope, np.float32)
        for i, row in enumerate(angle(np.concatenate([np.stack(starts), *rows]))):
            scale = s.scale if i < len(starts) else 1.0
            self.lib.make_angles(*s.channels, at(row), ctypes.c_float(scale), at(out[i * n_angle :]))
        for i, (x, y) in enumerate(ropes):
            self.lib.make_rope(*s.channels, at(angle(x)), at(angle(y)), at(out[self.n_rows * n_angle + i * n_rope :]))
        self.angles = out

    def params(self, flags: int = 0) -> Params:
        s = self.s
        return Params(flags=s.flags | flags, scale=1 / np.sqrt(s.d_k), n_rot=s.rotated_channels, n_head_kv=s.heads, d_k=s.d_k, d_v=s.d_v, n_rows=self.n_rows)

    def inputs(self, g: Graph) -> list[int | None]:
        """Pool, slots, tables, angles."""
        return [g.tensor(self.pool, "i8", self.pool.size), g.tensor(self.slots, "i32", len(self.tiles), 5), g.tensor(self.packed, "i8", self.packed.size),
                g.tensor(self.angles, "f32", self.angles.size) if self.angles is not None else None]  # fmt: skip

    def attention(self) -> np.ndarray:
        """f64 [tokens, heads*gqa, d_v]."""
        s = self.s
        k = np.concatenate([self.as_cached(self.hot_k), self.keys]).astype(np.float64)
        v = np.concatenate([self.as_cached(self.hot_v, 64), self.values]).astype(np.float64)
        q = self.q.astype(np.float64).reshape(s.tokens, s.heads, s.gqa, s.d_k)
        score = np.einsum("thgd,chd->thgc", q, k) / np.sqrt(s.d_k)
        score = np.where(self.visible[:, None, None], score, -np.inf)
        most = score.max(-1, keepdims=True)
        weight = np.exp(score - np.where(np.isfinite(most), most, 0))
        total = weight.sum(-1, keepdims=True)
        out = np.einsum("thgc,chd->thgd", weight / np.where(total > 0, total, 1), v)
        return out.reshape(s.tokens, s.heads * s.gqa, s.d_v)

    def as_cached(self, x: np.ndarray, n: int | None = None) -> np.ndarray:
        """Hot cells as the type of the cache holds them; a rotated cache holds rotated values, which are rotated back here."""
        d = x.shape[-1]
        y = rotate(x, n) if self.s.rotated else x
        y = DECODE[self.s.cache](ENCODE[self.s.cache](y.reshape(-1, d)), d).reshape(x.shape) if x.size else x
        return rotate(y, n) if self.s.rotated else y


def rotate(x: np.ndarray, n: int | None = None) -> np.ndarray:
    """Hadamard transform of runs of n values (or of the size for x), its own inverse."""
    return hadamard(x.reshape(*x.shape[:-1], -1, n)).reshape(x.shape) if n else hadamard(x)


def run_attention(data: Data, *, threads: int = 1) -> np.ndarray:
    """f32 [tokens, heads*gqa, d_v]."""
    s = data.s
    k, v = (rotate(x, n) if s.rotated else x for x, n in ((data.hot_k, None), (data.hot_v, 64)))
    mask = np.where(data.visible, 0, -np.inf)
    v = v.transpose(2, 1, 0) if s.v_trans else v
    with graph(1 << 27) as g:
        q = g.tensor(rotate(data.q) if s.rotated else data.q, "f32", s.d_k, s.heads * s.gqa, s.tokens)
        hot = [g.tensor(ENCODE[s.cache](x.reshape(-1, x.shape[-1])), s.cache, *x.shape[::-1]) for x in (k, v)]
        masks = [g.tensor(m.astype("<f4" if type_ == "f32" else "<f2"), type_, *m.shape[::-1]) for m, type_ in ((mask[:, : s.n_kv], s.mask), (mask[:, s.n_kv :], "f16"))]
        seen = g.tensor(data.seen, "i8", *data.seen.shape[::-1])
        node = ggml().ggml_capsule_tile_attn(g.context, ctypes.byref(data.params()), q, *hot, *masks, seen, *data.inputs(g))
        out = g.run(node, np.float32, threads).reshape(s.tokens, s.heads * s.gqa, s.d_v)
    return rotate(out, 64) if s.rotated else out


def run_unpack(data: Data, *, is_v: bool, threads: int = 1, copy: bool = False) -> np.ndarray:
    """f32 [columns, H*d], as the type of the cache holds it."""
    s = data.s
    width, columns = s.heads * (s.d_v if is_v else s.d_k), len(data.keys)
    trans = is_v and s.v_trans
    blank = ENCODE[s.cache](np.full((width, columns) if trans else (columns, width), 7, np.float32))
    with graph(1 << 27) as g:
        dst = g.tensor(blank, s.cache, *((columns, width) if trans else (width, columns)))
        node = ggml().ggml_capsule_tile_unpack(g.context, ctypes.byref(data.params(V if is_v else 0)), dst, copy, *data.inputs(g))
        raw = g.run(node, np.uint8, threads)
    out = DECODE[s.cache](raw.reshape(blank.shape), columns if trans else width)
    return out.T if trans else out


__all__ = ["TYPES", "Data", "Setting", "helper", "rotate", "run_attention", "run_unpack"]

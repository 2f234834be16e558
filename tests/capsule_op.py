"""GGML_OP_CAPSULE through ctypes on the CPU backend, and what numpy says about the same slots.

A `Setting` names a geometry; `Data.of(setting)` draws constants, slots (encoded by the numpy codec), positions, hot cells, masks and queries for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.pca import decode_pca, encode_pca
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.codec.retain import Retain, decode_retain, encode_retain
from kvcapsule_gguf.codec.rope import apply_rope, frequencies
from kvcapsule_gguf.codec.types import ROW_TYPES, RowCounts, row_counts, total_rows

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i8": 24, "i32": 26}  # enum ggml_type
V, V_TRANS, NORM, ROT_K, ROT_V, TILE_F32, RETAIN, _, QUERY, TIER_1 = (1 << i for i in range(10))  # enum ggml_capsule_flag

F32 = row_counts(f32=16)


@dataclass(frozen=True)
class Setting:
    """rows_k, rows_v: of both tiers; slots: per tier; rotated: a hot cache with Hadamard-rotated K and V; query: keys are not rebuilt; terms: per pattern, `pca`."""

    rows_k: tuple[RowCounts, RowCounts] = (F32, F32)
    rows_v: tuple[RowCounts, RowCounts] = (F32, F32)
    slots: tuple[int, int] = (3, 2)
    N: int = 16
    heads: int = 2
    group: int = 2
    d_k: int = 64
    d_v: int = 64
    n_rot: int = 64
    rope: str = "neox"
    tokens: int = 2
    n_kv: int = 40
    cache: str = "f32"
    mask: str = "f32"
    retain: tuple[bool, bool] = (False, False)
    kept: int = 0
    mlp: int = 0
    neighbours: int = 0
    v_trans: bool = False
    rotated: bool = False
    tile_f32: bool = True
    query: bool = False
    terms: tuple[int, int, int] = (0, 0, 0)
    parts: tuple[int, int] = (2, 2)
    sequences: int = 1
    ragged: float = 0.0  # share of the columns that no query sees
    seed: int = 0

    @property
    def flags(self) -> int:
        chosen = {V_TRANS: self.v_trans, NORM: self.rope == "norm", ROT_K: self.rotated, ROT_V: self.rotated, TILE_F32: self.tile_f32, QUERY: self.query}
        return sum(flag for flag, on in chosen.items() if on) + sum(RETAIN << i for i in range(2) if self.retain[i])

    @property
    def n_slots(self) -> int:
        return sum(self.slots)


class Params(ctypes.Structure):
    """struct ggml_capsule_params."""

    _fields_ = [
        ("op", ctypes.c_uint16), ("flags", ctypes.c_uint16), ("scale", ctypes.c_float),
        *((name, ctypes.c_uint16) for name in ("n_block", "n_kept", "n_mlp", "n_neighbours", "n_rot", "n_head_kv", "d_k", "d_v")),
        ("n_slots", ctypes.c_uint32 * 2), ("rows_k", ctypes.c_uint8 * 10), ("rows_v", ctypes.c_uint8 * 10),
        ("n_parts_hot", ctypes.c_uint16), ("n_parts_cold", ctypes.c_uint16), ("n_terms", ctypes.c_uint16),
    ]  # fmt: skip


class Weights(ctypes.Structure):
    """struct ggml_capsule_weights."""

    NAMES = ("k_mean", "v_mean", "k_basis", "k_basis_h", "v_basis", "v_basis_h", "v_basis_t", "token_order", "neighbours", "gate", "mlp_up", "mlp_up_bias", "mlp_down",
             "mlp_up_h", "mlp_down_h", "query_weight", "size")  # fmt: skip
    _fields_ = [(name, ctypes.c_int32) for name in NAMES]


def params(s: Setting, flags: int = 0) -> Params:
    rows = [(ctypes.c_uint8 * 10)(*(n for tier in both for n in tier)) for both in (s.rows_k, s.rows_v)]
    return Params(flags=s.flags | flags, scale=1 / np.sqrt(s.d_k), n_block=s.N, n_kept=s.kept, n_mlp=s.mlp, n_neighbours=s.neighbours, n_rot=s.n_rot,
                  n_head_kv=s.heads, d_k=s.d_k, d_v=s.d_v, n_slots=(ctypes.c_uint32 * 2)(*s.slots), rows_k=rows[0], rows_v=rows[1],
                  n_parts_hot=s.parts[0] if s.n_kv else 0, n_parts_cold=s.parts[1] if s.n_slots else 0, n_terms=max(s.terms))  # fmt: skip


@dataclass
class Data:
    """slots, keys, values: per tier; keys [n, H, N, d] as decoded, without RoPE; visible [tokens, columns], hot cells first."""

    s: Setting
    k_mean: np.ndarray
    v_mean: np.ndarray
    k_basis: np.ndarray
    v_basis: np.ndarray
    query_weight: np.ndarray
    retain: Retain
    slots: list[np.ndarray] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    first: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pattern: np.ndarray = field(default_factory=lambda: np.zeros(0))
    patterns: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, s: Setting) -> Data:
        rng = np.random.default_rng(s.seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        bases = [np.linalg.qr(normal(s.N, s.N))[0].astype(np.float32) for _ in range(2)]
        dropped = s.N - s.kept
        retain = Retain(rng.permutation(s.N), s.kept, rng.integers(0, max(s.kept, 1), (dropped, s.neighbours)), normal(s.heads, dropped, s.neighbours, s.d_k) / 2,
                        normal(s.heads, s.mlp, s.neighbours * s.d_k) / 8, normal(s.heads, s.mlp), normal(s.heads, s.d_k, s.mlp) / 4)  # fmt: skip
        query_weight = np.random.default_rng(s.seed).uniform(0.2, 3, (s.heads, s.d_k)).astype(np.float32)
        data = cls(s, normal(s.heads, s.d_k), normal(s.heads, s.d_v), *bases, query_weight, retain)
        for tier in range(2):
            n = s.slots[tier]
            k, v = normal(max(n, 1), s.heads, s.N, s.d_k), normal(max(n, 1), s.heads, s.N, s.d_v)  # the codec wants one block at least
            if s.retain[tier]:
                rows_k = encode_retain(k, retain, s.rows_k[tier])
                data.keys.append(decode_retain(rows_k, retain, s.rows_k[tier])[:n])
            else:
                rows_k = encode_pca(k, data.k_mean, bases[0], s.rows_k[tier])
                data.keys.append(decode_pca(rows_k, data.k_mean, bases[0], s.rows_k[tier])[:n])
            rows_v = encode_pca(v, data.v_mean, bases[1], s.rows_v[tier])
            data.values.append(decode_pca(rows_v, data.v_mean, bases[1], s.rows_v[tier])[:n])
            # f32 rows are read in place, so that heads begin at multiples of 4 bytes
            both = (rows_k, s.rows_k[tier]), (rows_v, s.rows_v[tier])
            flat = [pad4((pad4(rows) if counts[0] else rows).reshape(len(k), -1)[:n]) for rows, counts in both]
            data.slots.append(np.concatenate(flat, 1))
        # slots of three shapes: consecutive tokens, rows of a grid, anything
        data.patterns = np.stack([np.arange(s.N), 7 * (np.arange(s.N) // 4) + np.arange(s.N) % 4, rng.integers(-40, 40, s.N)])
        data.pattern = rng.integers(0, 3, s.n_slots)
        data.first = rng.integers(0, 500, s.n_slots)
        data.q, data.hot_k, data.hot_v = normal(s.tokens, s.heads * s.group, s.d_k), normal(s.n_kv, s.heads, s.d_k), normal(s.n_kv, s.heads, s.d_v)
        data.visible = rng.random((s.tokens, s.n_kv + s.n_slots * s.N)) >= s.ragged
        # a block belongs to one sequence, hot cells to all but the last token's: there are blocks that nobody sees
        owner = rng.integers(0, s.sequences, s.n_slots)
        data.visible[:, s.n_kv :] &= np.repeat(owner[None] == np.arange(s.tokens)[:, None] % s.sequences, s.N, 1)
        return data

    def __post_init__(self) -> None:
        self.q = self.hot_k = self.hot_v = self.visible = np.zeros(0)

    def cold_keys(self) -> np.ndarray:
        """f32 [columns, H, d], with RoPE."""
        s = self.s
        k = np.concatenate(self.keys).transpose(0, 2, 1, 3)
        pos = self.first[:, None] + self.patterns[self.pattern]
        if s.n_rot:
            k = np.stack([apply_rope(x.swapaxes(0, 1), p, rope_type=s.rope, n=s.n_rot).swapaxes(0, 1) for x, p in zip(k, pos, strict=True)]) if len(k) else k
        return k.reshape(-1, s.heads, s.d_k)

    def cold_values(self) -> np.ndarray:
        return np.concatenate(self.values).transpose(0, 2, 1, 3).reshape(-1, self.s.heads, self.s.d_v)

    def weights(self) -> np.ndarray:
        """I32 [size]."""
        s = self.s
        layout = ggml().ggml_capsule_weights_layout(ctypes.byref(params(s)))
        out = np.zeros(layout.size, np.int32)
        r, pad = self.retain, -s.N % 8
        up = r.mlp_up.swapaxes(1, 2)
        for name, x in {
            "k_mean": self.k_mean, "v_mean": self.v_mean, "query_weight": self.query_weight, "k_basis": np.pad(self.k_basis, ((0, 0), (0, pad))), "v_basis": np.pad(self.v_basis, ((0, 0), (0, pad))),
            "k_basis_h": half(self.k_basis), "v_basis_h": half(self.v_basis),
            "v_basis_t": self.v_basis.T, "token_order": r.order.astype(np.int32), "neighbours": r.neighbours.astype(np.int32), "gate": r.gate,
            "mlp_up": up, "mlp_up_bias": r.mlp_up_bias, "mlp_down": r.mlp_down.swapaxes(1, 2),
            "mlp_up_h": half_mlp_up(r.mlp_up, s), "mlp_down_h": np.pad(r.mlp_down.swapaxes(1, 2), ((0, 0), (0, -s.mlp % 16), (0, 0))).astype(np.float16),
        }.items():  # fmt: skip
            flat = np.ascontiguousarray(x).reshape(-1).view(np.int32)
            out[getattr(layout, name) : getattr(layout, name) + flat.size] = flat
        return out

    def rope(self) -> np.ndarray:
        """I32: angles of the first positions, patterns; angles of the distances and terms per pattern."""
        s = self.s
        if not s.n_rot:
            return np.zeros(0, np.int32)
        parts = [angles(self.first, s), self.pattern.astype(np.int32)]
        for pattern, n in zip(self.patterns, s.terms, strict=True):
            parts += [angles(pattern, s), *(terms_of(pattern, s, n) if max(s.terms) else [])]
        return np.concatenate([np.ascontiguousarray(p).reshape(-1).view(np.int32) for p in parts])

    def attention(self) -> np.ndarray:
        """f64 [tokens, heads*group, d_v]."""
        s = self.s
        k = np.concatenate([self.as_cached(self.hot_k), self.cold_keys()]).astype(np.float64)
        v = np.concatenate([self.as_cached(self.hot_v), self.cold_values()]).astype(np.float64)
        out = np.zeros((s.tokens, s.heads * s.group, s.d_v))
        for t in range(s.tokens):
            for h in range(s.heads * s.group):
                score = k[:, h // s.group] @ self.q[t, h].astype(np.float64) / np.sqrt(s.d_k)
                score[~self.visible[t]] = -np.inf
                if np.isfinite(score).any():
                    weight = np.exp(score - score.max())
                    out[t, h] = weight @ v[:, h // s.group] / weight.sum()
        return out

    def as_cached(self, x: np.ndarray) -> np.ndarray:
        """Hot cells as the type of the cache holds them; rotated caches hold the rotated values, which are rotated back here."""
        n, d = (64 if x is self.hot_v else None), x.shape[-1]
        y = rotate(x, n) if self.s.rotated else x
        y = DECODE[self.s.cache](ENCODE[self.s.cache](y.reshape(-1, d)), d).reshape(x.shape) if x.size else x
        return rotate(y, n) if self.s.rotated else y


def half(basis: np.ndarray) -> np.ndarray:
    """f16 [tokens, components], padded to multiples of 16."""
    return np.pad(basis.T, ((0, -len(basis) % 16),) * 2).astype(np.float16)


def half_mlp_up(up: np.ndarray, s: Setting) -> np.ndarray:
    """[heads, mlp, neighbours*d] -> f16 [heads, d, neighbours*mlp], rows padded to a multiple of 16."""
    x = up.reshape(s.heads, s.mlp, s.neighbours, s.d_k).transpose(0, 3, 2, 1).reshape(s.heads, s.d_k, -1)
    return np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % 16))).astype(np.float16)


def rotate(x: np.ndarray, n: int | None = None) -> np.ndarray:
    """Hadamard transform of runs of n values (or of the size for x), its own inverse."""
    return hadamard(x.reshape(*x.shape[:-1], -1, n)).reshape(x.shape) if n else hadamard(x)


def pad4(x: np.ndarray) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 4)])


def angles(pos: np.ndarray, s: Setting) -> np.ndarray:
    """f32 [..., n_rot]: (cos, sin) where the channels of the pair are."""
    angle = pos[..., None] * frequencies(s.n_rot, 10000.0)
    both = np.stack([np.cos(angle), np.sin(angle)], -1 if s.rope == "norm" else -2)
    return both.reshape(*pos.shape, s.n_rot).astype(np.float32)


def terms_of(pattern: np.ndarray, s: Setting, n: int) -> list[np.ndarray]:
    """How many, phi f32 [terms, N], ab f32 [terms, d_k]: the n best, the rest is zero."""
    angle = pattern[:, None] * np.concatenate([frequencies(s.n_rot, 10000.0), np.zeros((s.d_k - s.n_rot) // 2)])
    cos, sin = np.cos(angle), np.sin(angle)
    phi = np.linalg.svd(np.concatenate([cos, sin], 1))[0][:, :n].T
    both, half = np.stack([phi @ cos, phi @ sin], -1), s.n_rot // 2
    turned = both[:, :half] if s.rope == "norm" else both[:, :half].swapaxes(1, 2)
    ab = np.concatenate([turned.reshape(n, s.n_rot), both[:, half:].reshape(n, s.d_k - s.n_rot)], 1)
    rest = ((0, max(s.terms) - n), (0, 0))
    return [np.array([n], np.int32), np.pad(phi, rest).astype(np.float32), np.pad(ab, rest).astype(np.float32)]


# --- ggml ------------------------------------------------------------------------------------------------------------------------------------


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@cache
def ggml(folder: Path | None = None) -> Any:
    """ggml's own library and that of its CPU backend, as one object."""
    from conftest import library

    folder = folder or library("patched")
    base, cpu = (ctypes.CDLL(str(next(iter(sorted(folder.glob(f"lib{name}.so")) + sorted(folder.glob(f"lib{name}.dylib"))))), ctypes.RTLD_GLOBAL)
                 for name in ("ggml-base", "ggml-cpu"))  # fmt: skip
    if not hasattr(base, "ggml_capsule_attn"):
        raise RuntimeError(f"the ggml in {folder} has no GGML_OP_CAPSULE")
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParams]), ("ggml_free", None, [pointer]), ("ggml_get_data", pointer, [pointer]), ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_new_tensor_4d", pointer, [pointer, i32, i64, i64, i64, i64]), ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]), ("ggml_capsule_unpack", pointer, [pointer] * 7), ("ggml_capsule_attn", pointer, [pointer] * 11),
        ("ggml_capsule_encode", pointer, [pointer] * 7), ("ggml_capsule_errors", pointer, [pointer] * 7),
        ("ggml_capsule_weights_layout", Weights, [pointer]), ("ggml_capsule_slot_size", ctypes.c_size_t, [pointer, i32]), ("ggml_capsule_valid", ctypes.c_bool, [pointer]),
    ):  # fmt: skip
        getattr(base, name).restype, getattr(base, name).argtypes = result, arguments
    cpu.ggml_graph_compute_with_ctx.restype, cpu.ggml_graph_compute_with_ctx.argtypes = i32, [pointer, pointer, i32]
    base.compute = cpu.ggml_graph_compute_with_ctx
    return base


class Graph:
    """A ggml context with tensors filled from arrays."""

    def __init__(self, context: int):
        self.context = context

    def tensor(self, x: np.ndarray | None, type_: str, *ne: int) -> int | None:
        """ne: as ggml, the innermost first; x: its bytes."""
        if x is None:
            return None
        t = ggml().ggml_new_tensor_4d(self.context, TYPES[type_], *ne, *[1] * (4 - len(ne)))
        x = np.ascontiguousarray(x)
        assert ggml().ggml_nbytes(t) == x.nbytes, (ggml().ggml_nbytes(t), x.nbytes, ne)
        ctypes.memmove(ggml().ggml_get_data(t), x.ctypes.data, x.nbytes)
        return t

    def run(self, node: int, dtype: Any, threads: int = 1) -> np.ndarray:
        graph = ggml().ggml_new_graph(self.context)
        ggml().ggml_build_forward_expand(graph, node)
        assert ggml().compute(self.context, graph, threads) == 0
        n = ggml().ggml_nbytes(node)
        return np.frombuffer(ctypes.string_at(ggml().ggml_get_data(node), n), dtype).copy()


@contextmanager
def graph(mem_size: int = 1 << 26) -> Iterator[Graph]:
    context = ggml().ggml_init(InitParams(mem_size, None, False))
    try:
        yield Graph(context)
    finally:
        ggml().ggml_free(context)


def constants(g: Graph, data: Data) -> list[int | None]:
    """Blobs of both tiers, weights, angles."""
    s = data.s
    blobs = [g.tensor(slots, "i8", slots.size) if len(slots) else None for slots in data.slots]
    weights, rope = data.weights(), data.rope()
    return [*blobs, g.tensor(weights, "i32", weights.size), g.tensor(rope, "i32", rope.size) if s.n_rot and s.n_slots else None]


def run_unpack(data: Data, *, is_v: bool, threads: int = 1) -> np.ndarray:
    """f32 [columns, H*d], as the type of the cache holds it."""
    s = data.s
    width, columns = s.heads * (s.d_v if is_v else s.d_k), s.n_slots * s.N
    trans = is_v and s.v_trans
    blank = ENCODE[s.cache](np.full((width, columns) if trans else (columns, width), 7, np.float32))
    with graph() as g:
        dst = g.tensor(blank, s.cache, *((columns, width) if trans else (width, columns)))
        node = ggml().ggml_capsule_unpack(g.context, ctypes.byref(params(s, V if is_v else 0)), dst, *constants(g, data))
        raw = g.run(node, np.uint8, threads)
    out = DECODE[s.cache](raw.reshape(blank.shape), columns if trans else width)
    return out.T if trans else out


def run_attention(data: Data, *, threads: int = 1) -> np.ndarray:
    """f32 [tokens, heads*group, d_v]."""
    s = data.s
    k, v = (rotate(x, n) if s.rotated else x for x, n in ((data.hot_k, None), (data.hot_v, 64)))
    mask = np.where(data.visible, 0, -np.inf).astype("<f4" if s.mask == "f32" else "<f2")
    v = v.transpose(2, 1, 0) if s.v_trans else v
    with graph() as g:
        q = g.tensor(rotate(data.q) if s.rotated else data.q, "f32", s.d_k, s.heads * s.group, s.tokens)
        hot = [g.tensor(ENCODE[s.cache](x.reshape(-1, x.shape[-1])), s.cache, *x.shape[::-1]) for x in (k, v)]
        masks = [g.tensor(m, s.mask, *m.shape[::-1]) for m in (mask[:, : s.n_kv], mask[:, s.n_kv :])]
        node = ggml().ggml_capsule_attn(g.context, ctypes.byref(params(s)), q, *hot, *masks, *constants(g, data))
        out = g.run(node, np.float32, threads).reshape(s.tokens, s.heads * s.group, s.d_v)
    return rotate(out, 64) if s.rotated else out


def row_types(d: int, N: int) -> dict[str, RowCounts]:
    """All N rows of one type, and a mixture, of the types that fit d."""
    fits = [t.name for t in ROW_TYPES if t.fits(d)]
    mixed = {name: N // len(fits) for name in fits}
    mixed[fits[0]] += N - sum(mixed.values())
    out = {name: row_counts(**{name: N}) for name in fits} | {"mixed": row_counts(**mixed), "few": row_counts(**{fits[-1]: N // 3})}
    assert all(total_rows(counts) <= N for counts in out.values())
    return out

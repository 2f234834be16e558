"""A suite of pictures in every type at once: from the errors of all blocks with all types, any table and any choice of tiers is a look-up.

Only whole tiles: the study's pictures are cut so. What is read back is bit for bit what codec/head.py stores (tests/test_study.py).
The study also codes tiles of other shapes, blocks of other lengths, and a transform that is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..codec.channels import LANES, gather, key_groups, plain_groups, scatter
from ..codec.hadamard import hadamard
from ..codec.head import F16, Head, row_blocks
from ..codec.quality import score
from ..codec.quantize import rotated
from ..codec.registers import mix
from ..codec.scale import search
from ..codec.tiles import SIDE, inverse, transform
from ..format.base_model import BaseModel
from ..format.tile_transform import whole_of
from .fit_transform import KEPT_BITS, RetainOptions, fit_learned, fit_retain
from .source import KVSample

TYPES = (0, 1, 2, 3, 4, 6, 8, F16)
N = SIDE * SIDE
WHOLE = (SIDE, SIDE)
ROWS = np.array([b.stop - b.start for b in row_blocks(N)])
KINDS = ("k", "v")


@dataclass(frozen=True)
class Basis:
    """Of one kind in one layer: mean f32 [H, d]; axes f32 [H, d, d] or None; learned f32 [n, n]: rows over the tokens of a tile, in place of the DCT.

    retain: coders of the heads of keys that keep tokens and predict the others, from kept rows of KEPT_BITS whatever the table will say.
    tensors: what a file has of them.
    """

    mean: np.ndarray
    axes: np.ndarray | None = None
    learned: np.ndarray | None = None
    retain: list[Head] | None = None
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """f32 [tiles, H, n, d] -> coefficients, same shape."""
        if self.retain is not None:
            return np.stack([head.rows(x[:, i], *shape) for i, head in enumerate(self.retain)], 1)
        x = x - self.mean[:, None]
        rows = transform(x, *shape) if self.learned is None else self.learned @ x
        return rows if self.axes is None else rows @ self.axes

    def tokens(self, rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        if self.axes is not None:
            rows = rows @ self.axes.swapaxes(1, 2)
        return (inverse(rows, *shape) if self.learned is None else self.learned.T @ rows) + self.mean[:, None]


def whole_tiles(s: KVSample, shape: tuple[int, int] = WHOLE) -> np.ndarray:
    """int [tiles, n]: the tokens of the whole tiles of a picture; tiles of one line are runs and need no grid."""
    (height, width), n = shape, len(s.keys[0])
    if height == 1:
        return np.arange(n // width * width).reshape(-1, width)
    down, across = n // s.width // height, s.width // width
    at = np.arange(n // s.width * s.width).reshape(-1, s.width)[: down * height, : across * width]
    return at.reshape(down, height, across, width).swapaxes(1, 2).reshape(-1, height * width)


def tiles_of(samples: Sequence[KVSample], kind: str, i: int, shape: tuple[int, int] = WHOLE) -> np.ndarray:
    """f32 [tiles, H, n, d]."""
    return np.concatenate([(s.keys if kind == "k" else s.values)[i][whole_tiles(s, shape)] for s in samples]).swapaxes(1, 2)


def energy_of(x: np.ndarray) -> float:
    """f32 [tiles, H, n, d]: of a usual tile around the mean."""
    return float(np.square(x - x.mean((0, 2), keepdims=True)).sum((1, 2, 3)).mean())


def fit_basis(samples: Sequence[KVSample], model: BaseModel, mean: bool = True, v_axes: str = "full", k_axes: str = "none",
              shape: tuple[int, int] = WHOLE, learned: str = "", retain: RetainOptions | None = None) -> dict[tuple[str, int], Basis]:
    """axes: none, full, or the size of the blocks of channels (in the order of the groups) that have axes of their own.

    learned: the kinds with a learned transform, "", "v" or "kv"; retain: keys keep tokens. Raises TrainError.
    """
    out = {}
    for i in range(len(model.kv_layers)):
        for kind, axes in (("k", k_axes), ("v", v_axes)):
            x = tiles_of(samples, kind, i, shape)
            d = x.shape[-1]
            mu = x.mean((0, 2)) if mean else np.zeros(x.shape[1::2], np.float32)
            found = None
            if axes != "none":
                flat = (x - mu[:, None]).swapaxes(0, 1).reshape(x.shape[1], -1, d)
                cov = np.matmul(flat.swapaxes(1, 2), flat) / flat.shape[1]
                size = d if axes == "full" else int(axes)
                order = np.concatenate([g.ravel() for g in groups_of(model, kind, i)])
                found = np.zeros((x.shape[1], d, d), np.float32)
                for at in (order[j : j + size] for j in range(0, d, size)):
                    found[:, at[:, None], at] = np.linalg.eigh(cov[:, at[:, None], at].astype(np.float64))[1][..., ::-1]
                variance = np.einsum("hij,hik,hkj->hj", found, cov, found)
                for head, at in zip(found, (-variance).argsort(1)):  # the loudest axes share a group
                    head[:, order] = head[:, at]
            mu = mu.astype(np.float32)
            if kind == "k" and retain is not None:
                groups = groups_of(model, kind, i)
                tensors = fit_retain(x - mu[:, None], groups, retain)
                table = np.full((len(row_blocks(N)), len(groups)), KEPT_BITS, np.uint8)
                heads = [Head(m, groups, table, whole=whole_of(tensors, kind, h, groups)) for h, m in enumerate(mu)]
                out[kind, i] = Basis(mu, found, retain=heads, tensors=tensors)
            elif kind in learned:
                rows = fit_learned(x - mu[:, None])
                out[kind, i] = Basis(mu, found, rows.astype(np.float32), tensors={f"{kind}_transform": rows})
            else:
                out[kind, i] = Basis(mu, found)
    return out


def groups_of(model: BaseModel, kind: str, i: int) -> list[np.ndarray]:
    layer = model.kv_layers[i]
    if kind == "v":
        return plain_groups(model.value_length[layer])
    return key_groups(model.key_length[layer], model.rope_type if model.layer_rope[layer] else "none", model.rope_dimensions)


@dataclass
class Coded:
    """codes[kind, layer]: per type (scale f32 [T, H, 33, G], codes int8 [T, H, 33, G, 64]); errors[kind, layer] f32 [T, H, 33, G, types].

    hadamard: 0 none, 4 between registers (the format's), 64 over the whole block; shape: height and width of a tile; rows: of a block. The study alone
    has others than the format's.
    """

    model: BaseModel
    samples: Sequence[KVSample]
    basis: dict[tuple[str, int], Basis]
    types: tuple[int, ...] = TYPES
    hadamard: int = 4
    shape: tuple[int, int] = WHOLE
    rows: int = 2
    keep: bool = True  # the codes, for `read`; tables need the errors only
    codes: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    rival: dict = field(default_factory=dict)  # f32 [T]: the squared error of rotated q4_0
    groups: dict = field(default_factory=dict)
    energy: dict = field(default_factory=dict)  # of a tile around the mean of all tokens, mean over tiles

    def __post_init__(self) -> None:
        self.n = self.shape[0] * self.shape[1]
        self.blocks = row_blocks(self.n, self.rows)
        self.lengths = np.array([b.stop - b.start for b in self.blocks])
        for i in range(len(self.model.kv_layers)):
            for kind in KINDS:
                self._code(kind, i)

    def _mix(self, x: np.ndarray) -> np.ndarray:
        """[..., R, 16]; two rows are mixed at a time, and a single row (R = 2) in itself."""
        if self.hadamard == 0:
            return x
        if self.hadamard == 4:
            return np.concatenate([mix(x[..., i : i + 4, :]) for i in range(0, x.shape[-2], 4)], -2)
        return hadamard(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def _code(self, kind: str, i: int) -> None:
        x = tiles_of(self.samples, kind, i, self.shape)
        rows = self.basis[kind, i].rows(x, self.shape)
        groups = self.groups[kind, i] = groups_of(self.model, kind, i)
        y = np.zeros((*rows.shape[:2], len(self.blocks), len(groups), self.rows * 2 * LANES), np.float32)
        for g, group in enumerate(groups):
            z = gather(rows, group)
            for at, block in enumerate(self.blocks):
                part = self._mix(z[:, :, block].reshape(*z.shape[:2], -1, z.shape[-1]))
                y[:, :, at, g, : part.shape[2] * part.shape[3]] = part.reshape(*z.shape[:2], -1)
        shape = y.shape[:-1]
        errors = np.full((*shape, len(self.types)), np.inf, np.float32)
        for t, bits in enumerate(self.types):
            if bits == 0:
                errors[..., t] = np.square(y).sum(-1)
            elif bits == F16:
                errors[..., 0, :, t] = np.square(y[..., 0, :, :] - y[..., 0, :, :].astype(np.float16)).sum(-1)
                if self.keep:
                    self.codes[kind, i, bits] = y[..., 0, :, :].astype(np.float16)
            else:
                scale, c = search(y.reshape(-1, y.shape[-1]), bits)
                errors[..., t] = np.square(y - (scale[:, None] * c).reshape(y.shape)).sum(-1)
                if bits == 1:  # where rows are missing the search would see the padding
                    errors[..., self.lengths < self.rows, :, t] = np.inf
                if self.keep:
                    self.codes[kind, i, bits] = scale.reshape(shape), c.reshape(y.shape).astype(np.int8)
        self.errors[kind, i] = errors
        stored = rotated(x, "q4_0")
        self.rival[kind, i] = np.square(stored - x).sum((1, 2, 3))
        self.energy[kind, i] = energy_of(x)

    @property
    def tiles(self) -> int:
        return len(self.rival["k", 0])

    def relative(self, kind: str, i: int) -> np.ndarray:
        """f64 [H, 33, G, types]: mean error of every block, relative to the energy of a tile around the layer's mean."""
        return self.errors[kind, i].mean(0, dtype=np.float64) / self.energy[kind, i]

    def read(self, tables: Sequence[dict], pick: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """tables: per tier (kind, layer) -> bits [H, 33, G]; pick int [T]: the tier of every tile -> id of a sample's keys and layer -> K, V."""
        out = {}
        for i in range(len(self.model.kv_layers)):
            pair = [self.decode(kind, i, [t[kind, i] for t in tables], pick) for kind in KINDS]
            at = 0
            for s in self.samples:
                k, v = s.keys[i].copy(), s.values[i].copy()
                for tokens in whole_tiles(s, self.shape):
                    k[tokens], v[tokens] = pair[0][at].swapaxes(0, 1), pair[1][at].swapaxes(0, 1)
                    at += 1
                out[id(s.keys[i])] = k, v
        return out

    def decode(self, kind: str, i: int, tables: Sequence[np.ndarray], pick: np.ndarray) -> np.ndarray:
        """f32 [T, H, n, d]."""
        bits = np.stack(tables)[pick]  # [T, H, 33, G]
        y = np.zeros((*bits.shape, self.rows * 2 * LANES), np.float32)
        for b in np.unique(bits):
            where = bits == b
            if b == F16:
                y[:, :, 0][where[:, :, 0]] = self.codes[kind, i, F16][where[:, :, 0]]
            elif b:
                scale, codes = self.codes[kind, i, int(b)]
                y[where] = scale[where][:, None] * codes[where]
        basis, groups = self.basis[kind, i], groups_of(self.model, kind, i)
        rows = np.zeros((*bits.shape[:2], self.n, basis.mean.shape[-1]), np.float32)
        for g, group in enumerate(groups):
            for at, block in enumerate(self.blocks):
                rows_here = block.stop - block.start
                part = self._mix(y[:, :, at, g, : rows_here * group.size].reshape(*bits.shape[:2], 2 * rows_here, -1))
                scatter(rows[:, :, block], group, part.reshape(*bits.shape[:2], rows_here, 2, -1))
        return basis.tokens(rows, self.shape)


def values_of(groups: Sequence[np.ndarray], lengths: np.ndarray = ROWS) -> np.ndarray:
    """int [33, G]: how many values a block has; lengths: the rows of each block."""
    return lengths[:, None] * np.array([g.size for g in groups])


def costs(types: Sequence[int], groups: Sequence[np.ndarray], lengths: np.ndarray = ROWS) -> np.ndarray:
    """Bits of a block [33, G, types]: codes and scale."""
    values = values_of(groups, lengths)
    return np.stack([values * b + (0 if b in (0, F16) else 16) for b in types], -1).astype(np.float64)


def table_bits(tables: dict, groups: dict, lengths: np.ndarray = ROWS) -> float:
    """Bits for a value, scales included, of tables (kind, layer) -> bits [H, 33, G]."""
    total = stored = 0
    for x, t in tables.items():
        values = values_of(groups[x], lengths)
        stored += (values * t + np.where((t > 0) & (t < F16), 16, 0)).sum()
        total += t.shape[0] * values.sum()
    return float(stored / total)


def worst_tokens(coded: Coded, tables: dict) -> np.ndarray:
    """f64 [T]: the squared error of each tile's worst token over q4_0's mean error of a token there, mean over layers and over K and V."""
    out = []
    for (kind, i), t in tables.items():
        got = coded.decode(kind, i, [t], np.zeros(coded.tiles, int))
        error = np.square(got - tiles_of(coded.samples, kind, i, coded.shape)).sum((1, 3), dtype=np.float64)
        out.append(error.max(1) * coded.n / np.maximum(coded.rival[kind, i], 1e-20))
    return np.mean(out, 0)


def tile_errors(coded: Coded, tables: dict) -> dict[tuple[str, int], np.ndarray]:
    """f64 [T] for each kind and layer: the squared error of every tile."""
    out = {}
    for (kind, i), t in tables.items():
        e = coded.errors[kind, i]
        at = np.searchsorted(coded.types, t)
        out[kind, i] = np.take_along_axis(e, np.broadcast_to(at, e.shape[:-1])[..., None], -1)[..., 0].sum((1, 2, 3), dtype=np.float64)
    return out


def scores(coded: Coded, tables: dict, energy: dict[tuple[str, int], float]) -> np.ndarray:
    """f64 [T]: the error of each tile relative to the energy of a usual tile, mean over layers and over K and V."""
    return np.mean([e / energy[x] for x, e in tile_errors(coded, tables).items()], 0)


def rival_scores(coded: Coded, tables: dict, keys: float = 1) -> np.ndarray:
    """f64 [T]: the same in units of rotated q4_0's error on the same tile. keys: how often a key's error counts (the study's)."""
    parts = [(keys if x[0] == "k" else 1, e / np.maximum(coded.rival[x], 1e-20)) for x, e in tile_errors(coded, tables).items()]
    return np.average([e for _, e in parts], 0, [w for w, _ in parts])


def quality_scores(coded: Coded, tables: dict, energy: dict[tuple[str, int], float]) -> np.ndarray:
    """f64 [T]: what a tier is chosen by (codec/quality.py)."""
    errors = tile_errors(coded, tables)
    error, rival = (np.stack(x, -1) for x in (list(errors.values()), [coded.rival[x] for x in errors]))
    return score(error, rival, np.array([energy[x] for x in errors]))

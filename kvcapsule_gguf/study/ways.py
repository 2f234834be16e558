"""The ways to store K and V that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..codec.cut import BlockShape
from ..codec.types import RowCounts, row_counts, rows_bytes, total_rows
from ..format.base_model import BaseModel
from ..format.block import BlockCodec
from ..format.capsule import PCA, RETAIN, Layer
from ..train.fit_pca import fit_basis
from ..train.schedule import Part, retain_rows, schedule
from ..train.source import KVSample
from ..train.store import BlockStore
from ..train.trainer import FittedLayer, TrainOptions, fit_layer
from .predict import predicted

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.833, 0.875, 0.9, 0.95)
N = 64


@dataclass(frozen=True)
class Way:
    """codecs[l]: one for all heads of KV layer number l, or one for each; order: int [n] of the tokens of a picture, None = as they are."""

    name: str
    codecs: list[list[BlockCodec]]
    block: int = N
    order: np.ndarray | None = None

    def bits(self) -> float:
        stored = sum(c.slot_bytes for layer in self.codecs for c in layer)
        values = sum(self.block * c.layer.head_count_kv * (c.layer.key_length + c.layer.value_length) for layer in self.codecs for c in layer)
        return 8 * stored / values

    def work(self) -> float:
        """Multiplications for each decoded channel, mean of K and V: what decoding costs."""
        each = []
        for codec in (c for layer in self.codecs for c in layer):
            x, neighbours = codec.layer, 0 if codec.layer.k_gate is None else codec.layer.k_gate.shape[2]
            dropped = 1 - x.kept_count / self.block
            keys = total_rows(codec.key_rows) if codec.key_codec == PCA else dropped * (neighbours + x.mlp_width * (neighbours + 1))
            each.append((keys + total_rows(codec.value_rows)) / 2)
        return float(np.mean(each))

    def rows(self) -> tuple[str, str]:
        """Of keys and values in the first layer: q8_0 + q4_0 + q2_0, or f16."""
        first = self.codecs[0][0]
        return tuple(f"{r[1]} f16" if r[1] else " + ".join(map(str, r[2:])) for r in (first.key_rows, first.value_rows))  # type: ignore[return-value]

    def __call__(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(len(k)) if self.order is None else self.order
        cut = [x[order].reshape(-1, self.block, *x.shape[1:]).swapaxes(1, 2) for x in (k, v)]
        if len(self.codecs[i]) == 1:
            done = self.codecs[i][0].round_trip(*cut)
        else:
            heads = [c.round_trip(*(x[:, h : h + 1] for x in cut)) for h, c in enumerate(self.codecs[i])]
            done = tuple(np.concatenate([h[part] for h in heads], 1) for part in (0, 1))
        back = np.argsort(order)
        return tuple(y.swapaxes(1, 2).reshape(x.shape)[back] for x, y in zip((k, v), done))  # type: ignore[return-value]


def fit(model: BaseModel, samples: Sequence[KVSample], block: BlockShape = BlockShape(N), **options: object) -> list[FittedLayer]:
    with TemporaryDirectory() as folder, BlockStore(model, block, Path(folder)) as store:
        for i, s in enumerate(samples):
            store.add(i, s)
        store.held = [False] * len(store.held)
        width = block.tile_width or samples[0].width
        return [fit_layer(model, store, i, width, TrainOptions(**options)) for i in range(len(model.kv_layers))]  # type: ignore[arg-type]


def parts(found: Sequence[FittedLayer]) -> tuple[list[Part], list[Part]]:
    return [f.keys for f in found], [f.values for f in found]


def pca(name: str, found: Sequence[FittedLayer], rows: tuple[list[RowCounts], list[RowCounts]], n: int = N, order: np.ndarray | None = None) -> Way:
    return Way(name, [[BlockCodec(f.layer, PCA, k, v)] for f, k, v in zip(found, *rows)], n, order)


def dct(n: int) -> np.ndarray:
    """DCT-II, rows of falling smoothness, orthonormal."""
    t = np.arange(n)
    rows = np.cos(np.pi * (t + 0.5) * t[:, None] / n) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    return rows.astype(np.float32)


def with_basis(f: FittedLayer, basis: np.ndarray, blocks: Callable[[str], np.ndarray]) -> FittedLayer:
    """The layer with a given basis, sorted by the energy that it finds; blocks("k") f32 [B, H, N, d]."""

    def one(kind: str, mean: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.matmul(basis, (blocks(kind) - mean[:, None]) * np.sqrt(weight)[:, None])
        energy = np.square(rows).sum((1, 3)).mean(0, dtype=np.float64)
        order = np.argsort(-energy)
        return basis[order], energy[order] / energy.sum()

    x = f.layer
    k, k_energy = one("k", x.k_mean, x.k_query_weight)
    v, v_energy = one("v", x.v_mean, np.ones_like(x.v_mean))
    return FittedLayer(replace(x, k_basis=k, v_basis=v), Part(k_energy, f.keys.d, f.keys.heads), Part(v_energy, f.values.d, f.values.heads), None)


def per_head(name: str, found: Sequence[FittedLayer], rows: tuple[list[RowCounts], list[RowCounts]], blocks: Callable[[int, str], np.ndarray]) -> Way:
    codecs = []
    for i, (f, k_rows, v_rows) in enumerate(zip(found, *rows)):
        x, heads = f.layer, []
        for h in range(x.head_count_kv):
            k = fit_basis(blocks(i, "k")[:, h : h + 1], x.k_query_weight[h : h + 1])
            v = fit_basis(blocks(i, "v")[:, h : h + 1])
            heads.append(BlockCodec(_one_head(x, h, k.mean, k.rows, v.mean, v.rows), PCA, k_rows, v_rows))
        codecs.append(heads)
    return Way(name, codecs)


def _one_head(x: Layer, h: int, k_mean: np.ndarray, k_basis: np.ndarray, v_mean: np.ndarray, v_basis: np.ndarray) -> Layer:
    return replace(
        x, head_count_kv=1, k_mean=k_mean, k_basis=k_basis, v_mean=v_mean, v_basis=v_basis, k_query_weight=x.k_query_weight[h : h + 1]
    )


def ways(model: BaseModel, fitted: Sequence[KVSample], torch: bool = True, small: bool = False) -> Iterator[tuple[str, Way]]:
    """(question, way). torch: with key MLPs; small: a few of each kind, for tests."""
    found = fit(model, fitted)
    ratios = (0.6, 0.8, 0.875) if small else RATIOS

    def blocks(i: int, kind: str) -> np.ndarray:
        data = [(s.keys if kind == "k" else s.values)[i] for s in fitted]
        cut = [x[: len(x) // N * N].reshape(-1, N, *x.shape[1:]) for x in data]
        return np.concatenate(cut).swapaxes(1, 2)

    for ratio in ratios:
        yield "ratio", pca(f"pca, ratio {ratio}", found, schedule(*parts(found), N, ratio))
    if torch:
        for ratio in (0.875,) if small else (0.875, 0.9, 0.95):
            keys, values = schedule(*parts(found), N, ratio)
            codecs = [[predicted(f, k, v, blocks(i, "k"), 32)] if total_rows(k) < N else [BlockCodec(f.layer, PCA, k, v)]
                      for i, (f, k, v) in enumerate(zip(found, keys, values))]
            yield "MLP", Way(f"pca + MLP 32 for dropped key rows, ratio {ratio}", codecs)
    rows = schedule(*parts(found), N, 0.8)
    for n in (8, 16, 48, 96):
        if n < len(fitted):
            fewer = fit(model, fitted[:n])
            yield "pictures", pca(f"pca, fitted to {n} pictures", fewer, schedule(*parts(fewer), N, 0.8))
    yield "basis", per_head("pca, a basis for each head", found, rows, blocks)
    plain = [with_basis(f, dct(N), lambda kind, i=i: blocks(i, kind)) for i, f in enumerate(found)]
    yield "basis", pca("DCT instead of a learned basis", plain, schedule(*parts(plain), N, 0.8))
    mse = fit(model, fitted, loss="mse")
    yield "loss", pca("pca, fitted with plain MSE", mse, schedule(*parts(mse), N, 0.8))
    for name, counts in (
        ("f16 rows, the rest dropped", row_counts(f16=N // 5)), ("q8_0 rows, the rest dropped", row_counts(q8_0=24)), ("all rows q4_0", row_counts(q4_0=N)),
        ("all rows q2_0", row_counts(q2_0=N)), ("5 q8_0 + 16 q4_0 + 43 q2_0", row_counts(q8_0=5, q4_0=16, q2_0=43)),
    ):  # fmt: skip
        yield "bits", pca(name, found, ([counts] * len(found), [counts] * len(found)))
    yield "layers", pca("pca, layers pyramid", found, schedule(*parts(found), N, 0.8, "pyramid"))
    side = int(len(fitted[0].keys[0]) ** 0.5)
    for width, height in ((8, 8),) if small else ((8, 8), (4, 16)):
        if side % width == side % height == 0 and side * side == len(fitted[0].keys[0]):
            block = BlockShape(width * height, width)
            tiled = fit(model, fitted, block)
            yield "blocks", pca(f"pca, tiles of {width} x {height}", tiled, schedule(*parts(tiled), N, 0.8), order=block.order(side * side, side))
    for n in (32,) if small else (32, 48, 72, 96, 144):
        if len(fitted[0].keys[0]) % n == 0:
            other = fit(model, fitted, BlockShape(n))
            yield "blocks", pca(f"pca, N = {n}", other, schedule(*parts(other), n, 0.8), n)
    for near, h in ((4, 0),) if small else ((2, 0), (4, 0), (4, 8), (4, 16), (4, 32)):
        if h and not torch:
            continue
        for _, way in retain(fit(model, fitted, codec="retain", neighbours=near, mlp_width=h), near, h, rows[1]):
            yield "retain", way


def retain(found: Sequence[FittedLayer], near: int, h: int, value_rows: list[RowCounts], order: np.ndarray | None = None) -> Iterator[tuple[str, Way]]:
    kept = found[0].layer.kept_count
    energy = np.mean([f.retain_energy for f in found], 0)
    mlp = f"MLP {h}" if h else "gates only"
    value_bytes = rows_bytes(value_rows[0], found[0].values.d) / (2 * N * found[0].values.d)
    full = retain_rows(energy, kept, found[0].keys.d, 1 - (0.4 - value_bytes))  # together a fifth of f16
    for name, keys in (("residual", full), ("no residual, f16", row_counts(f16=kept)), ("no residual, q4_0", row_counts(q4_0=kept))):
        codecs = [[BlockCodec(f.layer, RETAIN, keys, v)] for f, v in zip(found, value_rows)]
        yield name, Way(f"retain, {near} neighbours, {mlp}, {name}", codecs, order=order)

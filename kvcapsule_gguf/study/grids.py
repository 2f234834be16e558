"""Pictures whose sides 8 does not divide: what the short tiles cost, in bytes and in error. And pictures whose width positions do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..codec.head import Head
from ..codec.tiles import SIDE, cut_grid, cut_run, cut_side, grid_width
from ..train.coded import KINDS, Coded
from ..train.source import KVSample
from ..train.tables import Tables

Cut = Callable[[int], list[int]]


def even(n: int) -> list[int]:
    """As few tiles as possible, as even as possible."""
    count = -(-n // SIDE)
    return [n // count + (i < n % count) for i in range(count)]


def shared(n: int, least: int = 4) -> list[int]:
    """Whole tiles; fewer than `least` tokens that are left are shared evenly with the tile before."""
    cut = cut_side(n)
    if len(cut) > 1 and cut[-1] < least:
        last = cut.pop() + cut.pop()
        cut += [last - last // 2, last // 2]
    return cut


RULES: dict[str, Cut] = {"what is left is a tile (the format)": cut_side, "all tiles as even as possible": even, "the last two share": shared}


def heads(coded: Coded, tables: Tables, kind: str, i: int) -> list[Head]:
    basis, groups = coded.basis[kind, i], coded.groups[kind, i]
    axes = [None] * len(basis.mean) if basis.axes is None else list(basis.axes)
    return [Head(mean, groups, table, a) for mean, table, a in zip(basis.mean, tables[kind, i], axes)]


def bits_of(coded: Coded, tables: Tables) -> dict[tuple[int, int], float]:
    """Bits of a slot for a token, for tiles of every height and width."""
    each = [h for kind, i in tables for h in heads(coded, tables, kind, i)]
    channels = sum(len(h.mean) for h in each)
    return {(h, w): 8 * sum(x.size(h, w) for x in each) / (h * w * channels) for h in range(1, 9) for w in range(1, 9)}


def crops(samples: Sequence[KVSample], seed: int = 0) -> Iterator[tuple[KVSample, int, int, np.ndarray]]:
    """A random part of each picture, 8 tokens or more each way: the picture, height, width, tokens."""
    rng = np.random.default_rng(seed)
    for s in samples:
        h, w = (int(rng.integers(SIDE, side + 1)) for side in (len(s.keys[0]) // s.width, s.width))
        y, x = (int(rng.integers(0, side - n + 1)) for side, n in zip((len(s.keys[0]) // s.width, s.width), (h, w)))
        yield s, h, w, ((y + np.arange(h))[:, None] * s.width + x + np.arange(w))


def rows(coded: Coded, tables: Tables, samples: Sequence[KVSample], layers: Sequence[int], sides: range = range(8, 41)) -> Iterator[str]:
    """The error is the squared error over the energy around the layer's mean, in units of that of whole tiles only."""
    bits = bits_of(coded, tables)
    yield f"| | of the ratio of whole tiles, all grids of {sides[0]} to {sides[-1]} | worst grid | error on parts of pictures |\n|---|---|---|---|"
    codes = {(kind, i): heads(coded, tables, kind, i) for i in layers for kind in KINDS}
    for name, cut in RULES.items():
        ratio = {}
        for height in sides:
            for width in sides:
                stored = sum(h * w * bits[h, w] for h in cut(height) for w in cut(width))
                ratio[height, width] = bits[SIDE, SIDE] * height * width / stored
        total = _error(codes, samples, cut) / _error(codes, samples, None)
        yield f"| {name} | {np.mean(list(ratio.values())):.3f} | {min(ratio.values()):.3f} | {total:.2f} |"


def _error(codes: dict, samples: Sequence[KVSample], cut: Cut | None) -> float:
    """None: whole tiles, of the whole pictures."""
    error = energy = 0.0
    for s, height, width, tokens in crops(samples):
        if cut is None:
            height, width = len(s.keys[0]) // s.width, s.width
            tokens = np.arange(height * width).reshape(height, width)
        at_y = np.cumsum([0, *(cut or cut_side)(height)])
        at_x = np.cumsum([0, *(cut or cut_side)(width)])
        for (kind, i), each in codes.items():
            x = (s.keys if kind == "k" else s.values)[i]
            for n, head in enumerate(each):
                for y0, y1 in zip(at_y, at_y[1:]):
                    for x0, x1 in zip(at_x, at_x[1:]):
                        t = x[tokens[y0:y1, x0:x1].ravel(), n]
                        size = int(y1 - y0), int(x1 - x0)
                        error += float(np.square(head.decode(head.encode(t, *size), *size) - t).sum())
                        energy += float(np.square(t - head.mean).sum())
    return error / energy


def width_rows(coded: Coded, tables: Tables, suites: dict[str, Sequence[KVSample]], layers: Sequence[int]) -> Iterator[str]:
    """Widths that are read from keys of the middle layer, of whole pictures and of four parts of each; with the error of cutting so, in units of the true grid's.

    With row ends: a token follows each row but the last, as in Pixtral. It is the mean of the picture half as large again.
    """
    codes = {(kind, i): heads(coded, tables, kind, i) for i in layers for kind in KINDS}
    yield "| pictures | width found | with row ends | error with the width found | in lines of 8 |\n|---|---|---|---|---|"
    for name, samples in suites.items():
        found, ends, error = [], [], np.zeros(3)
        whole = [(s, len(s.keys[0]) // s.width, s.width, np.arange(len(s.keys[0])).reshape(-1, s.width)) for s in samples]
        for s, height, width, tokens in [*whole, *(x for seed in range(4) for x in crops(samples, seed))]:
            keys = s.keys[len(s.keys) // 2]
            x = keys[tokens]
            end = np.broadcast_to(1.5 * keys.mean(0), (height, 1, *keys.shape[1:]))
            found.append(grid_width(x.reshape(-1, *x.shape[2:])))
            ends.append(grid_width(np.concatenate([x, end], 1).reshape(-1, *x.shape[2:])[:-1]) == width + 1)
            cuts = [cut_grid(height, width), cut_grid(height * width // found[-1], found[-1]), cut_run(height * width)]
            if sum(h * w for h, w, _ in cuts[1]) == height * width:  # it always divides the number of tokens, but for 8
                error += [_cut_error(codes, s, tokens.ravel(), cut) for cut in cuts]
            found[-1] = found[-1] == width
        yield f"| {name} | {sum(found)} of {len(found)} | {sum(ends)} of {len(ends)} | {error[1] / error[0]:.2f} | {error[2] / error[0]:.2f} |"


def _cut_error(codes: dict, s: KVSample, at: np.ndarray, cut: list[tuple[int, int, np.ndarray]]) -> float:
    """Squared error over the energy around the mean, of the tokens `at`."""
    error = energy = 0.0
    for (kind, i), each in codes.items():
        for n, head in enumerate(each):
            x = (s.keys if kind == "k" else s.values)[i][at, n]
            energy += float(np.square(x - head.mean).sum())
            error += sum(float(np.square(head.decode(head.encode(x[t], h, w), h, w) - x[t]).sum()) for h, w, t in cut)
    return error / energy

"""One table for each choice of format v2: everything else as decided, one thing changed (docs/reference/format-v2.md says what was chosen, and why).

Errors are those of rotated q4_0 on the vision cells times the figure: `KLD` of forced answers with a 95 % interval over pictures, and the geometric mean over pictures (study/divergence.py),
`attention` as study/measure.py defines it, of keys alone and of values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..codec.builtin import SMALLER as BUILTIN
from ..codec.quality import QUALITY, choose
from ..codec.rope import pair_index
from ..train.coded import Coded, N, fit_basis, quality_scores, rival_scores, scores, table_bits, tile_errors, whole_tiles, worst_tokens
from ..train.cross import cross_coded
from ..train.fit_tiles import BY_QUALITY, SMALLER, TYPES
from ..train.source import KVSample
from ..train.tables import Tables, builtin_tables, fit_tables
from . import methods, stock
from .decoder import Cache, Cells, Decoder
from .divergence import Answers, paired, picture_only, typical
from .measure import Measure, RoundTrip, rotated
from .pictures import Asked

QUALITIES = (0.5, 0.75, QUALITY, 2.0)
LOGIT = 0.05
# height and width of the tiles that are compared, where they divide the pictures
SHAPES = ((4, 4), (4, 8), (8, 8), (12, 12), (8, 16), (16, 16), (8, 24), (1, 32), (1, 64), (1, 96), (1, 128), (1, 144))

Pick = Callable[[Coded], np.ndarray]


@dataclass
class Suite:
    """answers to questions about pictures, their keys and values, and what rotated q4_0 does to them."""

    answers: Answers
    samples: list[KVSample] = field(default_factory=list)
    rival: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.samples = self.answers.samples()
        self.rival = self.divergence(rotated("q4_0"))

    @cached_property
    def measure(self) -> Measure:
        """Of attention over six of the pictures; only the first suite's is asked for."""
        return Measure(self.answers.decoder.model, self.samples[:6])

    def divergence(self, way: Callable) -> np.ndarray:
        return self.answers.divergence(picture_only(lambda n: lambda i, k, v: way(i, self.samples[n].keys[i], self.samples[n].values[i])))[0]

    def stock(self, cells: Cells) -> np.ndarray:
        self.answers.decoder.cells = cells
        try:
            return self.answers.divergence(lambda n, cache: cache)[0]
        finally:
            self.answers.decoder.cells = None


def wild(n: int, cache: Cache, tokens: int = 3, times: float = 4.0) -> Cache:
    """Three vision tokens of each picture, so many standard deviations away in all layers."""
    out = replace(cache, keys=list(cache.keys), values=list(cache.values))
    rng = np.random.default_rng([n, 8])
    at = cache.picture.start + rng.choice(cache.picture.stop - cache.picture.start, tokens, replace=False)
    for part in (out.keys, out.values):
        for i, x in enumerate(part):
            y = x.clone()
            y[at] += times * x[cache.picture].std((0, 1)) * torch.from_numpy(rng.standard_normal((tokens, *x.shape[1:])).astype(np.float32))
            part[i] = y
    return out


@dataclass
class Bench:
    """fit: what tables and axes are fitted to. The default coding is kept, and that of the built-in tables."""

    fit: Sequence[KVSample]
    suites: dict[str, Suite]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self):
        return next(iter(self.suites.values())).answers.decoder.model

    def code(self, basis: dict | None = None, fit: Sequence[KVSample] | None = None, lines: int = 0, **options: object) -> tuple[Coded, dict[str, Coded]]:
        """What is fitted to in axes of the other pictures of it, and the suites in axes of them all.

        basis: options of fit_basis; options: of Coded; lines: tokens are cut as if they lay in lines of so many.
        """
        def cut(samples: Sequence[KVSample]) -> Sequence[KVSample]:
            return [replace(s, width=lines) for s in samples] if lines else samples

        part, shape = cut(self.fit if fit is None else fit), {k: options[k] for k in ("shape",) if k in options}
        basis = shape | (basis or {})
        found = fit_basis(part, self.model, **basis)
        tests = {name: Coded(self.model, cut(s.samples), found, types=TYPES, **options) for name, s in self.suites.items()}  # type: ignore[arg-type]
        return cross_coded(self.model, part, TYPES, basis, **options), tests

    def default(self) -> tuple[Coded, dict[str, Coded]]:
        if "default" not in self.kept:
            self.kept["default"] = self.code()
        return self.kept["default"]

    def plain(self) -> dict[str, Coded]:
        """The suites without means and axes, as the built-in tables want them."""
        if "plain" not in self.kept:
            zero = fit_basis(self.fit[:1], self.model, mean=False, v_axes="none")
            self.kept["plain"] = {name: Coded(self.model, s.samples, zero, types=TYPES) for name, s in self.suites.items()}
        return self.kept["plain"]

    def head(self) -> str:
        names = list(self.suites)
        first = f"| | {names[0]}: smaller | KLD | attention | K | V |"
        return first + "".join(f" {n}: smaller | KLD |" for n in names[1:]) + "\n" + "|---" * (6 + 2 * (len(names) - 1)) + "|"

    def row(self, label: str, tests: dict[str, Coded], tables: Sequence[Tables], pick: Pick | None = None) -> str:
        stored = {}
        for name, coded in tests.items():
            chosen = pick(coded) if pick else np.zeros(coded.tiles, int)
            read = coded.read(tables, chosen)
            smaller = 16 / np.array([table_bits(t, coded.groups, coded.lengths) for t in tables])[chosen].mean()
            stored[name] = smaller, lambda i, k, v, read=read: read[id(k)]
        return self.line(label, stored)

    def line(self, label: str, stored: dict[str, tuple[float, RoundTrip]]) -> str:
        """stored: for each suite how many times smaller its pictures are, and what is read back."""
        cells = []
        for n, (name, (smaller, way)) in enumerate(stored.items()):
            suite = self.suites[name]
            kld = suite.divergence(way)
            ratio, low, high = paired(kld, suite.rival)
            cells.append(f"{smaller:.2f}x | {ratio:.2f} ({low:.2f} to {high:.2f}); {typical(kld, suite.rival):.2f}")
            if n == 0:
                cells.append(" | ".join(f"{e:.2f}" for e in suite.measure(way)))
        return f"| {label} | {' | '.join(cells)} |"

    def stock(self, keys: str, values: str, everywhere: bool) -> str:
        """llama.cpp's own types, of all cells or of the picture's."""
        cells, smaller = [], 32 / (stock.BITS[keys] + stock.BITS[values])
        for n, suite in enumerate(self.suites.values()):
            ratio, low, high = paired(suite.stock(stock.cells(keys, values, everywhere)), suite.rival)
            cells.append(f"{smaller:.2f}x | {ratio:.3f} ({low:.3f} to {high:.3f}){' | | |' if n == 0 else ''}")
        name = keys if keys == values else f"{keys} K + {values} V"
        return f"| llama.cpp's {name}, {'all' if everywhere else 'vision'} cells | {' | '.join(cells)} |"


def smallest(tables: Sequence[Tables], score: Callable[[Coded, Tables], np.ndarray], limit: float) -> Pick:
    """Of every tile the first (smallest) tier whose score is at most `limit`, else the last."""

    def pick(coded: Coded) -> np.ndarray:
        pick = choose(np.stack([score(coded, t) for t in tables]), limit)
        return np.where(pick < 0, len(tables) - 1, pick)

    return pick


def matched(tables: Sequence[Tables], score: Callable[[Coded, Tables], np.ndarray], coded: Coded, smaller: float) -> float:
    """The limit with which `coded` gets so many times smaller."""
    bits, low, high = np.array([table_bits(t, coded.groups, coded.lengths) for t in tables]), 1e-6, 1e6
    each = np.stack([score(coded, t) for t in tables])
    for _ in range(60):
        limit = (low * high) ** 0.5
        fits = each <= limit
        got = bits[np.where(fits.any(0), fits.argmax(0), len(tables) - 1)].mean()
        low, high = (limit, high) if got > 16 / smaller else (low, limit)
    return high


def rows(bench: Bench, axis: str, sizes: Sequence[float] = (5.0,)) -> Iterator[str]:
    model = bench.model
    layers = range(len(model.kv_layers))
    yield bench.head()

    def fixed(label: str, coding: tuple[Coded, dict[str, Coded]] | None = None, at: Sequence[float] = sizes, **options: object) -> Iterator[str]:
        fitted, tests = coding or bench.default()
        for tables in fit_tables(fitted, [16 / x for x in at], **({"types": TYPES} | options)):  # type: ignore[arg-type]
            yield bench.row(label, tests, [tables])

    def by_tile(label: str, coding: tuple[Coded, dict[str, Coded]], keys: float = 1, **options: object) -> Iterator[str]:
        """A tier for each tile by its error over q4_0's, with the limit that makes the first suite so many times smaller."""
        def way(c: Coded, t: Tables) -> np.ndarray:
            return rival_scores(c, t, keys)

        fitted, tests = coding
        tables = fit_tables(fitted, [16 / x for x in SMALLER[BY_QUALITY:]], types=TYPES, **options)  # type: ignore[arg-type]
        for size in sizes:
            limit = matched(tables, way, next(iter(tests.values())), size)
            yield bench.row(f"{label}, a tier for each tile", tests, tables, smallest(tables, way, limit))

    if axis == "stock":
        for keys, values in (("q4_0", "q4_0"), ("iq4_nl", "iq4_nl"), ("q5_0", "q4_0"), ("q8_0", "q4_0"), ("q8_0", "q8_0")):
            for everywhere in (False, True):
                yield bench.stock(keys, values, everywhere)
    elif axis == "fixed":
        yield from fixed("one table")
    elif axis == "weight":
        fitted, _ = bench.default()
        measure = Measure(model, bench.fit[:4])
        unit = measure.by_layer(rotated("q4_0")) * measure.unit
        rival = {x: fitted.energy[x] / float(fitted.rival[x].mean()) for x in fitted.energy}
        attention = {(kind, i): float(unit[i, 1 + "kv".index(kind)]) * rival[kind, i] for kind in "kv" for i in layers}
        for name, w in (("energy around the mean", dict.fromkeys(fitted.energy, 1)), ("q4_0's error", rival), ("attention's error", attention)):
            for per_layer in (False, True):
                yield from fixed(f"{name}, {'the same bytes for each layer' if per_layer else 'over all layers'}", weight=w, per_layer=per_layer)
    elif axis == "kinds":
        fitted, _ = bench.default()
        for times in (0.5, 1, 2, 4):
            weight = {x: times if x[0] == "k" else 1 for x in fitted.energy}
            yield from fixed(f"keys count {times:g} times", weight=weight)
            yield from by_tile(f"keys count {times:g} times", bench.default(), weight=weight)
        yield from by_tile("keys count 2 times, in the score as well", bench.default(), keys=2)
        plain = bench.plain()
        for more in (0, 0.25, 0.5):
            yield bench.row(f"built in, {2 * more:g} bits more for keys than for values", plain, [builtin_tables(model, 4.25, more)])
    elif axis == "types":
        for types in ((0, 2, 4, 8), (0, 2, 3, 4, 6), (0, 2, 3, 4, 6, 8), (0, 1, 2, 3, 4, 6, 8), TYPES):
            yield from fixed(", ".join(map(str, types[1:])) + " bits", types=types)
    elif axis == "hadamard":
        for n in (0, 4, 64):
            yield from fixed(f"{n or 'no'} points", bench.default() if n == 4 else bench.code(hadamard=n))
    elif axis == "axes":
        for v, k in (("full", "full"), ("full", "16"), ("full", "4"), ("full", "none"), ("none", "none")):
            coding = bench.default() if (v, k) == ("full", "none") else bench.code({"v_axes": v, "k_axes": k})
            yield from fixed(f"V {v}, K {k}", coding, at=(*sizes, 8))
    elif axis == "tiles":
        whole = bench.fit[0]
        for shape, lines in (*((shape, 0) for shape in SHAPES), ((8, 8), 8)):
            if whole_tiles(whole, shape).size == len(whole.keys[0]):
                label = f"runs of {shape[1]}" if shape[0] == 1 else "runs of 64, in lines of 8" if lines else "tiles of {} x {}".format(*shape)
                fitted, tests = bench.code(shape=shape, lines=lines)
                yield from fixed(label, (fitted, tests))
                yield from by_tile(label, (fitted, tests))
    elif axis == "blocks":
        for n in (1, 2, 4):
            yield from fixed(f"blocks of {32 * n} values", bench.default() if n == 2 else bench.code(rows=n))
    elif axis == "learned":
        for learned in (False, True):
            yield from fixed("a transform learned for each layer" if learned else "DCT", bench.code({"learned": "kv"}) if learned else None, at=(*sizes, 8))
    elif axis == "methods":
        for label, make in methods.rows(model, bench.fit):
            yield bench.line(label, {name: make(s.samples) for name, s in bench.suites.items()})
    elif axis == "scope":
        for scope in ("head", "layer", "model"):
            for groups in ("group", "row"):
                yield from fixed(f"a table for each {scope}, {'groups apart' if groups == 'group' else 'one for all groups'}", scope=scope, groups=groups)
    elif axis == "pictures":
        plain = bench.plain()
        for size in sizes:
            yield bench.row("none: built in", plain, [builtin_tables(model, size)])
        for n in (1, 4, 12, 24):
            if n <= len(bench.fit):
                part = bench.fit[:n]
                cross, tests = bench.code(fit=part)
                same = Coded(model, part, next(iter(tests.values())).basis, types=TYPES, keep=False)
                yield from fixed(f"{n}, tables from the same pictures as axes", (same, tests))
                if n > 1:
                    yield from fixed(f"{n}, tables from pictures that the axes do not know", (cross, tests))
    elif axis == "builtin":
        fitted, tests = bench.code({"mean": False, "v_axes": "none"})
        for size in (3.5, 4, 4.25, 4.5, 5):
            yield bench.row("built in", tests, [builtin_tables(model, size)])
        yield from fixed("zero mean, no axes, tables fitted for each head", (fitted, tests), at=(4.25, 5))
        yield from fixed("zero mean, no axes, one table for all fitted", (fitted, tests), at=(4.25,), scope="model", groups="row")
    elif axis == "score":
        fitted, tests = bench.default()
        tables = fit_tables(fitted, [16 / x for x in SMALLER], types=TYPES)
        ways = {
            "error over the layer's energy": lambda c, t: scores(c, t, fitted.energy),
            "error over q4_0's on the tile": rival_scores,
        }
        for size in sizes:
            yield bench.row("one table", tests, fit_tables(fitted, [16 / size], types=TYPES))
            for name, way in ways.items():
                limit = matched(tables, way, next(iter(tests.values())), size)
                yield bench.row(f"tier of each tile by {name}, at most {limit:.3f}", tests, tables, smallest(tables, way, limit))
    elif axis == "worst":
        fitted, tests = bench.default()
        tables = fit_tables(fitted, [16 / x for x in SMALLER], types=TYPES)[BY_QUALITY:]
        known: dict[tuple[int, int], np.ndarray] = {}

        def worst(c: Coded, t: Tables) -> np.ndarray:
            at = id(c), id(t)
            if at not in known:
                known[at] = worst_tokens(c, t)
            return known[at]

        for size in sizes:
            for part in (None, 8, 4, 2, 1):
                way = rival_scores if part is None else lambda c, t, part=part: np.maximum(rival_scores(c, t), worst(c, t) / part)
                limit = matched(tables, way, next(iter(tests.values())), size)
                label = f"the tile's error at most {limit:.2f}" + (f", its worst token's at most {part * limit:.2f}" if part else "")
                yield bench.row(label, tests, tables, smallest(tables, way, limit))
    elif axis == "limits":
        fitted, tests = bench.default()
        part = fit_tables(fitted, [16 / x for x in SMALLER], types=TYPES)[BY_QUALITY:]
        query = [float(np.sqrt(np.mean([np.square(s.queries[i]).mean() for s in bench.fit]))) for i in layers]

        def logit(c: Coded, t: Tables) -> np.ndarray:
            """The mean square of the error of a logit over the square of LOGIT: rms of a key's error times rms of a query, since both have d channels and 1 / sqrt(d)."""
            errors = tile_errors(c, t)
            values = [N * model.head_count_kv[layer] * model.key_length[layer] for layer in model.kv_layers]
            return np.mean([errors["k", i] / values[i] * (query[i] / LOGIT) ** 2 for i in layers], 0)

        ways = {
            "over q4_0's alone": rival_scores,
            "over q4_0's, and over the energy at most 0.03": lambda c, t: quality_scores(c, t, fitted.energy),
            f"over q4_0's, and of a logit at most {LOGIT}": lambda c, t: np.maximum(rival_scores(c, t), logit(c, t)),
            f"of a logit alone, at most {LOGIT}": logit,
        }
        for name, way in ways.items():
            yield bench.row(f"quality {QUALITY:g}, error {name}", tests, part, smallest(part, way, QUALITY))
    elif axis == "quality":
        fitted, tests = bench.default()
        tables = fit_tables(fitted, [16 / x for x in SMALLER], types=TYPES)
        for q in QUALITIES:
            part = tables[BY_QUALITY:]
            yield bench.row(f"quality {q}", tests, part, smallest(part, lambda c, t: quality_scores(c, t, fitted.energy), q))
    elif axis == "builtin-quality":
        tests = bench.plain()
        tables = [builtin_tables(model, x) for x in BUILTIN]
        for q in QUALITIES:
            yield bench.row(f"built in, quality {q}", tests, tables, smallest(tables, lambda c, t: quality_scores(c, t, c.energy), q))
        for size in (4, 4.25):
            yield bench.row("built in, one table", tests, [builtin_tables(model, size)])
    else:
        raise ValueError(f"unknown axis {axis}")


def with_key_bias(decoder: Decoder, samples: Sequence[KVSample], times: float) -> None:
    """Adds a constant of `times` the rms of a layer's keys to both channels of every head's slowest RoPE pair, as some models have by nature.

    Attention hardly changes, since all keys get the same; a codec has to store it.
    """
    model = decoder.model
    pair = pair_index(model.rope_type, model.rope_dimensions)[-1]
    for i, layer in enumerate(model.kv_layers):
        rms = float(np.sqrt(np.mean([np.square(s.keys[i]).mean() for s in samples])))
        name, heads, d = f"blk.{layer}.attn_k.bias", model.head_count_kv[layer], model.key_length[layer]
        bias = torch.zeros(heads, d)
        bias[:, list(pair)] = torch.tensor([times * rms, -times * rms])
        decoder.w[name] = decoder.w.get(name, torch.zeros(heads * d)) + bias.reshape(-1)


def bias_rows(decoder: Decoder, asked: Sequence[Asked], questions: int, all_times: Sequence[float] = (0, 10, 30, 100)) -> Iterator[str]:
    """The built-in capsule and rotated q4_0 where keys have large biases: KLD itself, and how many of the answers' tokens change."""
    yield "| bias, times rms | stored as | smaller | KLD | tokens that change |\n|---|---|---|---|---|"
    plain = Answers.of(decoder, asked[:2], questions, written=1).samples()
    had = {name: w for name, w in decoder.w.items() if name.endswith("attn_k.bias")}
    for times in all_times:
        with_key_bias(decoder, plain, times)
        answers = Answers.of(decoder, asked, questions)
        samples = answers.samples()
        coded = Coded(decoder.model, samples, fit_basis(samples[:1], decoder.model, mean=False, v_axes="none"), types=TYPES)
        tables = [builtin_tables(decoder.model, x) for x in BUILTIN]
        pick = smallest(tables, lambda c, t: quality_scores(c, t, c.energy), QUALITY)(coded)
        read, rival = coded.read(tables, pick), rotated("q4_0")
        smaller = 16 / np.array([table_bits(t, coded.groups) for t in tables])[pick].mean()
        for name, size, way in ((f"built in, quality {QUALITY:g}", smaller, lambda i, k, v: read[id(k)]), ("rotated q4_0", 16 / 4.5, rival)):
            kld, turned = answers.divergence(picture_only(lambda n: lambda i, k, v: way(i, samples[n].keys[i], samples[n].values[i])))
            yield f"| {times} | {name} | {size:.2f}x | {kld.mean():.5f} | {100 * turned.mean():.1f} % |"
        for name in [n for n in decoder.w if n.endswith("attn_k.bias")]:
            decoder.w.pop(name)
        decoder.w.update(had)

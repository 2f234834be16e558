"""The study of format v2 on a small synthetic model: its short cuts give what the reference gives, and bits go where brute force puts them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from conftest import library
from synthetic_kv import source

from kvcapsule_gguf.codec.allocate import allocate
from kvcapsule_gguf.codec.builtin import builtin_table
from kvcapsule_gguf.codec.channels import plain_groups
from kvcapsule_gguf.codec.head import F16, Head
from kvcapsule_gguf.codec.tiles import cut_grid
from kvcapsule_gguf.study import grids, methods
from kvcapsule_gguf.study.measure import Measure, rotated
from kvcapsule_gguf.train.coded import KINDS, TYPES, Coded, costs, fit_basis, rival_scores, table_bits, worst_tokens
from kvcapsule_gguf.train.cross import cross_coded
from kvcapsule_gguf.train.tables import fit_tables


@pytest.fixture(scope="module")
def data(models):
    return source(models(arch="llama"), 6)


@pytest.fixture(scope="module")
def coded(data):
    fit = data.samples[:4]
    basis = fit_basis(fit, data.model)
    return Coded(data.model, fit, basis), Coded(data.model, data.samples[4:], basis)


def heads(coded: Coded, tables, kind: str, i: int) -> list[Head]:
    basis, groups = coded.basis[kind, i], coded.groups[kind, i]
    axes = [None] * len(basis.mean) if basis.axes is None else basis.axes
    return [Head(mean, groups, table, a) for mean, table, a in zip(basis.mean, tables[kind, i], axes)]


def test_the_short_cut_is_the_reference(coded):
    fitted, test = coded
    tables = fit_tables(fitted, [3.2])[0]
    tables["v", 0][0, 0, 0], tables["k", 0][0, 32, :] = F16, 3  # a row in f16, and a row alone
    tiles = len(test.rival["k", 0])
    read = test.read([tables], np.zeros(tiles, int))
    bits = 0
    for i in range(len(test.model.kv_layers)):
        for s in test.samples:
            for x, got, kind in zip((s.keys[i], s.values[i]), read[id(s.keys[i])], KINDS):
                for h, w, tokens in cut_grid(len(x) // s.width, s.width):
                    for n, head in enumerate(heads(test, tables, kind, i)):
                        stored = head.encode(x[tokens, n], h, w)
                        bits += 8 * stored.size
                        assert got[tokens, n] == pytest.approx(head.decode(stored, h, w), abs=2e-4)
    values = sum(x.size for s in test.samples for x in (*s.keys, *s.values))
    assert 0 <= bits / values - table_bits(tables, test.groups) < 0.03  # without padding


def test_scores_are_errors_in_units_of_q4_0(coded):
    fitted, test = coded
    tables = fit_tables(fitted, [3.2])[0]
    read, rival = test.read([tables], np.zeros(len(test.rival["k", 0]), int)), rotated("q4_0")
    ratios = []
    for i in range(len(test.model.kv_layers)):
        for part in (0, 1):
            each = []
            for s in test.samples:
                x, y, q = ((s.keys[i], s.values[i])[part], read[id(s.keys[i])][part], rival(i, s.keys[i], s.values[i])[part])
                for *_, at in cut_grid(len(x) // s.width, s.width):
                    each.append(np.square(x[at] - y[at]).sum() / np.square(x[at] - q[at]).sum())
            ratios.append(each)
    assert rival_scores(test, tables) == pytest.approx(np.mean(ratios, 0), rel=1e-3)



@pytest.mark.parametrize("options", [{"shape": (4, 8)}, {"shape": (1, 32)}, {"shape": (16, 16)}, {"rows": 1}, {"rows": 4}, {"learned": "kv"}, {"k_axes": "4"}])
def test_other_codings_lose_only_what_their_bits_lose(data, options):
    basis = fit_basis(data.samples, data.model, **{k: v for k, v in options.items() if k not in ("rows",)})
    coded = Coded(data.model, data.samples, basis, **{k: v for k, v in options.items() if k in ("shape", "rows")})
    tables = {x: np.full(e.shape[1:4], 8) for x, e in coded.errors.items()}
    read = coded.read([tables], np.zeros(coded.tiles, int))
    values = 32 * options.get("rows", 2)
    assert 8 + 16 / values <= table_bits(tables, coded.groups, coded.lengths) <= 8 + 2 * 16 / values
    for s in data.samples:
        for i in range(len(data.model.kv_layers)):
            for x, got in zip((s.keys[i], s.values[i]), read[id(s.keys[i])]):
                assert 0 < np.square(x - got).sum() < 1e-4 * np.square(x - x.mean(0)).sum()


def test_the_worst_token_is_the_worst(coded):
    fitted, test = coded
    tables = fit_tables(fitted, [3.2])[0]
    read = test.read([tables], np.zeros(test.tiles, int))
    ratios = []
    for i in range(len(test.model.kv_layers)):
        for part in (0, 1):
            each = []
            for s in test.samples:
                x, q = (s.keys[i], s.values[i])[part], rotated("q4_0")(i, s.keys[i], s.values[i])[part]
                error, rival = (np.square(x - y).sum((1, 2)) for y in (read[id(s.keys[i])][part], q))
                each += [error[at].max() / rival[at].mean() for *_, at in cut_grid(len(x) // s.width, s.width)]
            ratios.append(each)
    assert worst_tokens(test, tables) == pytest.approx(np.mean(ratios, 0), rel=1e-3)


def test_the_paper_s_map_finds_tokens_that_make_the_others(models):
    """With RoPE in the keys, and all tokens combinations of 60 of them, 102 of 256 tokens are enough."""
    data = source(models(arch="llama"), 5)
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((256, 60)).astype(np.float32) / 8
    maker = methods.Whole.__new__(methods.Whole)
    maker.model = data.model
    for s in data.samples:
        for i in range(len(s.keys)):
            heads, d = s.keys[i].shape[1:]
            s.keys[i] = maker.turned(i, s, np.einsum("nr,rhd->nhd", mixed, rng.standard_normal((60, heads, d)).astype(np.float32)), inverse=True)
            s.values[i] = np.einsum("nr,rhd->nhd", mixed, rng.standard_normal((60, heads, d)).astype(np.float32))
    smaller, way = methods.Whole(data.model, data.samples[:4], 0.4)(data.samples[4:])
    assert smaller == pytest.approx(2.5, abs=0.01)
    for x, got in zip((data.samples[4].keys[0], data.samples[4].values[0]), way(0, data.samples[4].keys[0], data.samples[4].values[0])):
        assert np.square(x - got).sum() < 0.1 * np.square(x).sum()


def test_tables_keep_their_budget_and_more_bits_err_less(data, coded):
    fitted, test = coded
    measure = Measure(data.model, test.samples)
    errors = []
    for bits, tables in zip((1.5, 2.5, 3.2, 5), fit_tables(fitted, [1.5, 2.5, 3.2, 5])):
        assert bits - 0.1 < table_bits(tables, fitted.groups) <= bits + 1e-9
        read = test.read([tables], np.zeros(len(test.rival["k", 0]), int))
        errors.append(measure(lambda i, k, v: read[id(k)])[0])
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0] / 5


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize("groups", ["group", "row"])
def test_shared_tables_are_shared(coded, scope, groups):
    tables = fit_tables(coded[0], [3.0], scope, groups, types=(0, 2, 4, 8))[0]
    assert set(np.unique(np.concatenate([t.ravel() for t in tables.values()]))) <= {0, 2, 4, 8}
    for (kind, _), t in tables.items():
        assert scope == "head" or (t == t[:1]).all()
        assert scope != "model" or (t == tables[kind, 0]).all()
        assert groups != "row" or (t == t[..., :1]).all()


def test_allocation_is_within_a_block_of_the_best_there_is():
    rng = np.random.default_rng(0)
    cost = costs(TYPES, [np.zeros((2, 16))])[1, 0, :4]
    for _ in range(20):
        errors = rng.exponential(size=(5, 1)) * np.array([1, 0.4, 0.12, 0.03]) * rng.uniform(0.8, 1.2, (5, 4))
        budget = rng.uniform(1, 3) * 5 * 64
        pick = allocate(errors, cost, budget)
        spent = cost[pick].sum()
        assert spent <= budget
        found = errors[np.arange(5), pick].sum()
        best = min(errors[np.arange(5), list(p)].sum() for p in product(range(4), repeat=5) if cost[list(p)].sum() <= spent)
        assert found <= best * 1.1
    with pytest.raises(ValueError, match="budget"):
        allocate(errors, cost + 1, 1)


def test_the_built_in_table_keeps_its_size_and_falls_with_frequency():
    for smaller in (8, 5, 4, 2.5):
        table, groups = builtin_table(16 / smaller, 2), {("v", 0): plain_groups(64)}
        assert table.shape == (33, 2) and (table[0] == F16).all()
        assert 16 / smaller - 0.25 < table_bits({("v", 0): table[None]}, groups) <= 16 / smaller
        assert table[1, 0] == table[1:].max() and table[32, 0] <= table[16, 0] <= table[1, 0]


def test_short_tiles_keep_the_ratio(coded):
    fitted, test = coded
    tables = fit_tables(fitted, [3.2])[0]
    lines = list(grids.rows(fitted, tables, test.samples[:1], [0], range(8, 41, 3)))
    kept = {line.split(" | ")[0].strip("| "): float(line.split(" | ")[1]) for line in lines[1:]}
    assert min(kept.values()) >= 0.85


@pytest.mark.parametrize("name", ["demo", "mrope"])
def test_the_decoder_is_llama_cpp_s(name, tmp_path):
    """The study's own decoder against llama.cpp with an f16 cache, on a forced answer about a picture."""
    torch = pytest.importorskip("torch")
    library("patched")
    from kvcapsule_gguf.chat.files import demo_folder
    from kvcapsule_gguf.eval.cache import Cache
    from kvcapsule_gguf.eval.settings import Setting
    from kvcapsule_gguf.eval.vlm import Vlm
    from kvcapsule_gguf.study.decoder import Decoder, Shown
    from kvcapsule_gguf.study.pictures import asked, studies

    study = studies(demo_folder(), None)[name]
    found = asked(study, "like", 1, tmp_path)[0]
    decoder = Decoder(study.decoder)
    shown = decoder.show(Shown(found.before, found.embd, found.width))
    ours = [decoder.output @ h.T for h in decoder.branches(shown, [t for t, _ in found.questions])]
    vlm = Vlm(study.decoder, study.mmproj, 1)
    try:
        from kvcapsule_gguf.eval.prompts import Prompts

        picture = vlm.read(Prompts(vlm).before(), next(study.items("like"))[0])
        cache = Cache(vlm, Setting("f16"), 2048, len(found.questions))
        try:
            cache.show(picture, {})
            n_past = len(found.before) + (found.width if name == "mrope" else len(found.embd))
            tail = cache.n_past - n_past  # tokens after the picture that belong to it
            theirs = cache.ask([(t[tail:], n) for t, n in found.questions])
        finally:
            cache.close()
            picture.free()
    finally:
        vlm.close()
    for got, want, (_, n) in zip(ours, theirs, found.questions):
        p, q = (torch.log_softmax(torch.as_tensor(x), -1) for x in (want, got.T[-n - 1 : -1]))
        assert float((p.exp() * (p - q)).sum(-1).max()) < 1e-4


@pytest.fixture(scope="module")
def bench(models):
    """The study on a tiny model with random weights that looks at smooth random pictures of 8 x 8 tokens."""
    pytest.importorskip("torch")
    from synthetic_kv import field

    from kvcapsule_gguf.study.axes import Bench, Suite, wild
    from kvcapsule_gguf.study.decoder import Decoder
    from kvcapsule_gguf.study.divergence import Answers
    from kvcapsule_gguf.study.pictures import Asked

    decoder = Decoder(models(arch="llama"))
    width = decoder.embed.shape[1]
    asked = [Asked([1, 2], field(np.random.default_rng(i), 8, (width,)), 8, [([5, 6, 7, 8], 2), ([9, 3], 0)]) for i in range(5)]
    like = Answers.of(decoder, asked[2:4], written=2)
    suites = {"like": Suite(like), "wild": Suite(like.changed(wild))}
    return Bench(Answers.of(decoder, asked[:2], written=1).samples(), suites), asked


def cells(line: str) -> list[str]:
    return [c.strip() for c in line[1:-1].split("|")]


@pytest.mark.parametrize("axis", ["stock", "weight", "types", "hadamard", "axes", "scope", "pictures", "score", "limits", "quality", "builtin", "builtin-quality"])
def test_every_axis_makes_its_table(bench, axis):
    from kvcapsule_gguf.study.axes import rows

    lines = list(rows(bench[0], axis))
    widths = {len(cells(line)) for line in "\n".join(lines).splitlines()}
    assert len(lines) > 2 and widths == {8}
    found = {cells(line)[0]: cells(line) for line in lines[1:]}
    if axis == "stock":
        kld = {name: float(c[2].split()[0]) for name, c in found.items() if "llama.cpp" in name}
        assert 0.3 < kld["llama.cpp's q4_0, vision cells"] < 3 and kld["llama.cpp's q8_0, vision cells"] < 0.1
        assert all(kld[name.replace("vision", "all")] > x for name, x in kld.items() if "vision" in name)
    if axis == "quality":
        sizes = [float(c[1].rstrip("x")) for name, c in found.items() if name.startswith("quality")]
        errors = [float(c[3]) for name, c in found.items() if name.startswith("quality")]
        assert sizes == sorted(sizes) and errors == sorted(errors)


def test_a_key_bias_is_stored(bench):
    from kvcapsule_gguf.study.axes import bias_rows

    first, asked = bench
    decoder = first.suites["like"].answers.decoder
    before = dict(decoder.w)
    found = [cells(line) for line in list(bias_rows(decoder, asked[2:4], 2, (0, 100)))[1:]]
    assert decoder.w.keys() == before.keys()
    ours, theirs = (float(next(c[3] for c in found if c[0] == "100" and c[1].startswith(name))) for name in ("built in", "rotated"))
    assert ours < theirs


def test_a_picture_is_coded_in_axes_of_the_others(data):
    fit = data.samples[:4]
    cross = cross_coded(data.model, fit)
    alone = Coded(data.model, fit[2:3], fit_basis([fit[0], fit[1], fit[3]], data.model))
    tiles = alone.tiles
    for x in alone.errors:
        assert np.array_equal(cross.errors[x][2 * tiles : 3 * tiles], alone.errors[x])
    assert cross.energy == Coded(data.model, fit, fit_basis(fit, data.model), types=(0, 4)).energy


def test_iq4_nl_is_ggmls():
    """Its 16 values, times a scale, come back as they are; other values come back as the nearest ones of some scale, better than q4_0's on normal values."""
    from kvcapsule_gguf.study.stock import CODES, _round_trip

    exact = 0.5 * np.repeat(CODES, 2).reshape(1, 32)
    assert np.array_equal(_round_trip(exact, "iq4_nl"), exact)
    assert not _round_trip(np.zeros((2, 32), np.float32), "iq4_nl").any()
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    errors = [np.square(_round_trip(x, name) - x).mean() for name in ("q8_0", "iq4_nl", "q4_0")]
    assert errors == sorted(errors)

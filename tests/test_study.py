"""The study of format v2 on a small synthetic model: its short cuts give what the reference gives, and bits go where brute force puts them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from synthetic_kv import source

from kvcapsule_gguf.codec.head import F16, Head
from kvcapsule_gguf.codec.tiles import cut_grid
from kvcapsule_gguf.study.coded import KINDS, TYPES, Coded, costs, fit_basis, groups_of, scores, table_bits
from kvcapsule_gguf.study.measure import Measure, rotated
from kvcapsule_gguf.study.tables import fit_tables
from kvcapsule_gguf.train.allocate import allocate


@pytest.fixture(scope="module")
def data(models):
    return source(models(arch="llama"), 6)


@pytest.fixture(scope="module")
def coded(data):
    fit = data.samples[:4]
    basis = fit_basis(fit, data.model)
    return Coded(data.model, fit, basis), Coded(data.model, data.samples[4:], basis)


def heads(coded: Coded, tables, kind: str, i: int) -> list[Head]:
    basis, groups = coded.basis[kind, i], groups_of(coded.model, kind, i)
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
    assert bits / values == pytest.approx(table_bits(tables))


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
    assert scores(test, tables) == pytest.approx(np.mean(ratios, 0), rel=1e-3)


def test_tables_keep_their_budget_and_more_bits_err_less(data, coded):
    fitted, test = coded
    measure = Measure(data.model, test.samples)
    errors = []
    for bits, tables in zip((1.5, 2.5, 3.2, 5), fit_tables(fitted, [1.5, 2.5, 3.2, 5])):
        assert bits - 0.1 < table_bits(tables) <= bits + 1e-9
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
    cost = costs(TYPES)[1, 0, :4]
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

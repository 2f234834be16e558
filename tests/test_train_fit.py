"""The fits find what is known to be there, and the schedules keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kvcapsule_gguf.codec.types import ROW_TYPES, legal, row_counts, rows_bytes, total_rows
from kvcapsule_gguf.train.fit_pca import fit_basis
from kvcapsule_gguf.train.fit_retain import RetainOptions, fit_gates, fit_retain, frequency_groups
from kvcapsule_gguf.train.guard import thresholds
from kvcapsule_gguf.train.pattern import kept_tokens, most_used_first, neighbours
from kvcapsule_gguf.train.schedule import DISTORTION, Part, allocate, faithful_rows, layer_ratios, retain_rows, schedule
from kvcapsule_gguf.train.sensitivity import groups, weights

rng = np.random.default_rng(0)

# --- PCA ---


def test_a_known_basis_is_found():
    """Blocks made of an orthonormal basis with falling energies, 4 ** -r: the same rows come back, up to their sign, with these energies."""
    n, d, heads = 12, 16, 2
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    energy = 4.0 ** -np.arange(n)
    mean = rng.standard_normal((heads, d))
    rows = rng.standard_normal((3000, heads, n, d)) * np.sqrt(energy)[:, None]
    found = fit_basis((basis.T @ rows + mean[:, None]).astype(np.float32))
    assert np.abs(found.mean - mean).max() < 0.05
    assert np.allclose(found.energy[:6] / (heads * d), energy[:6], rtol=0.1)  # below, the error of the mean shows
    assert np.abs(np.abs((found.rows * basis).sum(1))[:6] - 1).max() < 0.01


def test_basis_is_orthonormal_and_sorted():
    found = fit_basis(rng.standard_normal((50, 2, 48, 64)).astype(np.float32))
    assert np.allclose(found.rows @ found.rows.T, np.eye(48), atol=1e-5)
    assert (np.diff(found.energy) <= 1e-9).all()


def test_no_other_basis_keeps_more():
    """Eckart-Young: for any number of rows, no orthonormal basis leaves a smaller weighted error on the fitted blocks."""
    blocks = rng.standard_normal((40, 2, 16, 8)).astype(np.float32)
    blocks = np.cumsum(blocks, 2)
    weight = rng.uniform(0.1, 3, (2, 8)).astype(np.float32)
    found = fit_basis(blocks, weight)
    x = (blocks - found.mean[:, None]) * np.sqrt(weight)[:, None]

    def left(rows: np.ndarray, r: int) -> float:
        return float(np.square(x - rows[:r].T @ (rows[:r] @ x)).sum())

    for r in (1, 4, 8, 15):
        assert left(found.rows, r) == pytest.approx(len(blocks) * found.energy[r:].sum(), rel=1e-3)
        for other in (fit_basis(blocks).rows, np.eye(16), np.linalg.qr(rng.standard_normal((16, 16)))[0]):
            assert left(found.rows, r) <= left(other, r) * (1 + 1e-5)


def test_weight_moves_the_basis_to_what_queries_see():
    """One channel varies with the first token only, another more loudly with the last: with all weight on the first, its token comes first."""
    blocks = np.zeros((100, 1, 8, 2), np.float32)
    blocks[:, 0, 0, 0] = rng.standard_normal(100)
    blocks[:, 0, 7, 1] = 5 * rng.standard_normal(100)
    assert np.abs(fit_basis(blocks).rows[0]).argmax() == 7
    assert np.abs(fit_basis(blocks, np.array([[1.0, 1e-4]])).rows[0]).argmax() == 0


# --- retain ---


@pytest.mark.parametrize(("rope", "pairs"), [("norm", [(0, 1), (2, 3), (4, 5), (6, 7)]), ("neox", [(0, 4), (1, 5), (2, 6), (3, 7)]), ("mrope", [(0, 4), (1, 5)])])
def test_frequency_groups(rope, pairs):
    groups = frequency_groups(rope, 8, 8)
    assert groups.max() == 3 and all(groups[a] == groups[b] for a, b in pairs)
    part = frequency_groups("neox", 8, 4)
    assert part[0] == part[2] and part[1] == part[3] and len(set(part[4:])) == 4
    assert len(set(frequency_groups("none", 8, 8))) == 8


@pytest.mark.parametrize("rope", ["norm", "neox"])
def test_known_gates_are_found(rope):
    """y is a gated sum of x: the gates come back, equal within each pair."""
    groups = frequency_groups(rope, 8, 8)
    gates = rng.standard_normal((2, 3, 2, 4))[..., groups]
    x = rng.standard_normal((500, 2, 3, 2, 8)).astype(np.float32)
    found = fit_gates(x, (x * gates).sum(3).astype(np.float32), groups, 1e-6)
    assert np.allclose(found, gates, atol=1e-2)


def test_gates_are_least_squares():
    """Against numpy's own solver, a pair of channels at a time."""
    groups = frequency_groups("norm", 4, 4)
    x, y = rng.standard_normal((50, 1, 2, 3, 4)).astype(np.float32), rng.standard_normal((50, 1, 2, 4)).astype(np.float32)
    found = fit_gates(x, y, groups, 1e-9)
    for j in range(2):
        for pair in ([0, 1], [2, 3]):
            a = x[:, 0, j][:, :, pair].transpose(0, 2, 1).reshape(-1, 3)
            best = np.linalg.lstsq(a, y[:, 0, j][:, pair].reshape(-1), rcond=None)[0]
            assert np.allclose(found[0, j, :, pair], best, atol=1e-4)


def curved_blocks(count: int, n: int, d: int) -> np.ndarray:
    """Every token is a point on one curve in d dimensions, at a place that wanders along the tokens: no channel by itself says where to go next."""
    place = np.cumsum(0.5 * rng.standard_normal((count, 2, n, 1)), 2)
    speed, phase = np.random.default_rng(5).uniform([0.5, 0], [2.5, 6], (d, 2)).T
    return (np.cos(place * speed + phase) + 0.3).astype(np.float32)


def test_the_mlp_helps_and_the_order_is_worst_first():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    blocks = curved_blocks(400, 24, 32)
    kept = row_counts(f32=10)
    weight = np.ones((2, 32), np.float32)

    def errors(h: int) -> np.ndarray:
        layer, energy = fit_retain(blocks[:320], weight, "norm", 32, RetainOptions(10, 2, h, seed=3), kept)
        assert (np.diff(energy[10:]) <= 0).all() and energy[:10].min() > energy[10]
        assert sorted(layer.order) == list(range(24)) and (np.diff(np.bincount(layer.neighbours.ravel(), minlength=10)) <= 0).all()
        test = blocks[320:]
        return np.square(layer.predict(test[:, :, layer.order[:10]]) - test[:, :, layer.order[10:]]).mean((0, 1, 3))

    plain, with_mlp = errors(0), errors(16)
    assert with_mlp.sum() < 0.95 * plain.sum()
    assert plain[:4].mean() > 1.2 * plain[-4:].mean()


@pytest.mark.parametrize("n", [48, 64, 72, 96])
@pytest.mark.parametrize("width", [0, 24])
def test_pattern(n, width):
    for m in (n // 5, round(0.4 * n), n // 2):
        kept = kept_tokens(n, m, width)
        assert len(set(kept)) == m and (np.diff(kept) > 0).all()
        # spread evenly: no gap is more than three mean ones
        assert np.diff(np.concatenate([[-1], kept, [n]])).max() <= 3 * n / m
        dropped, near = neighbours(n, kept, 4, width)
        assert sorted([*dropped, *kept]) == list(range(n)) and near.min() >= 0 and near.max() < m
        for t, row in zip(dropped, near):
            assert len(set(row)) == 4
            left, right = [k for k in kept if k < t], [k for k in kept if k > t]
            assert (not left or left[-1] in kept[row[:2]]) and (not right or right[0] in kept[row[:2]])
        ordered, same = most_used_first(kept, near)
        assert (ordered[same] == kept[near]).all() and sorted(ordered) == kept.tolist()
        assert (np.diff(np.bincount(same.ravel(), minlength=m)) <= 0).all()


def test_neighbours_above_and_below():
    """Rows of 4 tokens, kept 0 2 5 8 10: token 6 has 5 on its left, 8 on its right, 2 above and 10 below."""
    kept = np.array([0, 2, 5, 8, 10])
    dropped, near = neighbours(12, kept, 4, 4)
    assert kept[near[dropped.tolist().index(6)]].tolist() == [5, 8, 2, 10]
    few = neighbours(4, np.array([1]), 3)[1]
    assert few.tolist() == [[0, 0, 0]] * 3


# --- schedules ---

energies = st.lists(st.floats(1e-6, 1), min_size=4, max_size=4).map(sorted)


def falling(n: int, rate: float) -> np.ndarray:
    e = np.exp(-rate * np.arange(n) / n)
    return e / e.sum()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([16, 32, 48, 64, 72, 96, 128]), st.sampled_from([32, 64, 80, 96, 128, 256]), st.floats(0.1, 0.9), st.floats(0, 12), st.floats(0, 12),
    st.integers(1, 8),
)  # fmt: skip
def test_allocation(n, d, ratio, a, b, heads):
    parts = [Part(falling(n, a), d, heads), Part(falling(n, b), d, heads)]
    rows = allocate(parts, n, ratio)
    for counts in rows:
        assert legal(counts, d) == counts
        total = total_rows(counts)
        assert 1 <= total <= n and (total == n or total % 16 == 0 or total == 8)
    used = sum(p.bytes(c) for p, c in zip(parts, rows)) / (4 * n * d * heads)
    if d % 32 == 0 and n >= 32 and ratio <= 0.85:
        assert 1 - ratio - 0.17 * 32 / n <= used <= 1 - ratio or (used < 1 - ratio and all(c[2] == n for c in rows))


def cost(energy: np.ndarray, counts: tuple[int, ...]) -> float:
    d = np.repeat([0, 0, DISTORTION["q8_0"], DISTORTION["q4_0"], DISTORTION["q2_0"]], counts)
    return float((energy[: len(d)] * d).sum() + energy[len(d) :].sum())


@pytest.mark.parametrize("rate", [1, 4, 9])
@pytest.mark.parametrize("fixed", [(4, 44, 0), (4, 12, 32), (2, 10, 36), (0, 20, 28), (10, 10, 28)])
def test_no_fixed_mix_is_better(rate, fixed):
    """For its bytes, on the model of errors that it minimizes."""
    mix = row_counts(q8_0=fixed[0], q4_0=fixed[1], q2_0=fixed[2])
    part = Part(falling(48, rate), 64, 2)
    ratio = 1 - rows_bytes(mix, 64) / (48 * 128)
    found = allocate([part], 48, ratio)[0]
    assert rows_bytes(found, 64) <= rows_bytes(mix, 64)
    assert cost(part.energy, found) <= cost(part.energy, mix) * 1.02


def test_bytes_go_to_the_part_that_needs_them():
    easy, hard = Part(falling(64, 12), 64, 2), Part(falling(64, 1), 64, 2)
    rows = allocate([easy, hard], 64, 0.8)
    assert easy.bytes(rows[0]) < hard.bytes(rows[1])


def test_presets_are_what_they_say():
    part = Part(falling(64, 6), 64, 2)
    for ratio, smaller in ((0.6, 2.5), (0.8, 5.0), (0.875, 8.0)):
        rows = allocate([part, part], 64, ratio)
        assert 64 * 128 * 2 / sum(rows_bytes(r, 64) for r in rows) == pytest.approx(smaller, rel=0.02)
    for d in (64, 96, 128):
        assert 3.3 <= 128 * d / rows_bytes(faithful_rows(64, d), d) <= 3.6


@pytest.mark.parametrize("ratio", [0.6, 0.7, 0.8, 0.85])
@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("residual", [1.0, 0.1, 0.001])
def test_retain_rows(ratio, d, residual):
    energy = np.concatenate([np.ones(26), residual * falling(38, 3) * 38])
    rows = retain_rows(energy, 26, d, ratio)
    assert 26 <= total_rows(rows) <= 64 and legal(rows, d) == rows
    assert rows_bytes(rows, d) <= max((1 - ratio) * 128 * d + 1, rows_bytes(legal(row_counts(q4_0=26), d), d))


def test_residuals_get_what_they_are_worth():
    """At 3.3x: where the prediction is poor, 4-bit residuals; where it is good, kept tokens in q8_0."""
    poor, good = (retain_rows(np.concatenate([np.ones(26), np.full(38, r)]), 26, 64, 0.7) for r in (0.8, 0.01))
    assert poor[3] > 35 and poor[2] < 6
    assert good[2] > 20


def test_pyramid():
    """The paper's: bytes fall from the first layer to the last, their mean stays."""
    ratios = layer_ratios(8, 0.8)
    assert ratios == sorted(ratios) and np.mean(ratios) == pytest.approx(0.8)
    part = Part(falling(64, 5), 64, 2)
    keys, values = schedule([part] * 8, [part] * 8, 64, 0.8, "pyramid")
    sizes = [rows_bytes(k, 64) + rows_bytes(v, 64) for k, v in zip(keys, values)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]
    assert sum(sizes) / (8 * 4 * 64 * 64) == pytest.approx(0.2, rel=0.02)


def test_uniform_and_sensitivity():
    """The bytes are the same; where an error costs more, more of them are spent, and the total cost falls."""
    part = Part(falling(64, 3), 64, 2)
    weights = (np.array([8.0, 0.5]), np.array([1.0, 0.1]))

    def cost(rows) -> float:
        spread = [np.repeat(list(DISTORTION.values()), r[1:]) for r in rows]
        return sum(w * (part.energy[: len(d)] * d).sum() for w, d in zip(np.concatenate(weights), spread))

    found = {layers: schedule([part] * 2, [part] * 2, 64, 0.8, layers, weights) for layers in ("uniform", "sensitivity")}
    for keys, values in found.values():
        assert sum(rows_bytes(r, 64) for r in keys + values) / (2 * 4 * 64 * 64) == pytest.approx(0.2, rel=0.02)
    assert found["uniform"][0][0] == found["uniform"][0][1]
    keys, values = found["sensitivity"]
    sizes = [rows_bytes(r, 64) for r in (keys[0], values[0], keys[1], values[1])]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.3 * sizes[-1]
    assert cost(keys + values) < 0.8 * cost([*found["uniform"][0], *found["uniform"][1]])


def test_groups_and_weights_of_layers():
    assert [len(g) for g in groups(8)] == [1] * 8 and [list(g) for g in groups(5, 2)] == [[0, 1], [2, 3, 4]]
    todo = [(kind, g) for g in groups(3, 3) for kind in "kv"]
    kld = np.array([[4e-3, 2e-3], [1e-4, 1e-4], [1e-3, 1e-3], [1e-4, 1e-4], [1e-4, 1e-4], [1e-4, 1e-4]])
    keys, values = weights(todo, kld, 3)
    assert np.concatenate([keys, values]).mean() == pytest.approx(1)
    assert keys[0] > keys[1] > keys[2] == pytest.approx(values[0]) and keys[0] / keys[2] < 30


def test_row_types_have_a_distortion():
    assert set(DISTORTION) == {t.name for t in ROW_TYPES} - {"f32"}


# --- guard ---


def test_thresholds():
    """97 of 100 blocks pass in all layers, whatever the scale of a layer's scores; without the margin not one more than needed."""
    score = rng.lognormal(0, 1, (6, 400)) * np.array([1, 10, 0.1, 5, 2, 100])[:, None]
    kappa = thresholds(score, share=0.97, margin=1.0)
    passed = (score <= kappa[:, None]).all(0).mean()
    assert 0.97 <= passed < 0.98
    assert (kappa * 1.1 == thresholds(score, share=0.97, margin=1.1)).all()

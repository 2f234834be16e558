"""Transforms of whole tiles that are not the DCT: learned ones, and kept tokens with their predictor, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_kv import field, source

from kvcapsule_gguf.codec.channels import key_groups
from kvcapsule_gguf.codec.head import F16, F32, Head
from kvcapsule_gguf.codec.transform import Learned, N, Retain, gate_of_channels
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule, write_tile_capsule
from kvcapsule_gguf.format.tile_transform import whole_of
from kvcapsule_gguf.train.fit_tiles import CODECS, SMALLER, fit_tile_capsule
from kvcapsule_gguf.train.fit_transform import RetainOptions, fit_gates, fit_retain

RNG = np.random.default_rng(5)
D, KEPT, NEAR, H = 24, 25, 3, 5
GROUPS = key_groups(D, "neox", D)
X = field(RNG, 8, (D,))


def matrix() -> np.ndarray:
    return np.linalg.qr(RNG.standard_normal((N, N)))[0].astype(np.float32)


def retain(h: int = 0) -> Retain:
    gate = (RNG.standard_normal((N - KEPT, NEAR, D)) / NEAR).astype(np.float32)
    mlp = [(0.2 * RNG.standard_normal(shape)).astype(np.float32) for shape in ((h, NEAR * D), (h,), (D, h))]
    return Retain(RNG.permutation(N), RNG.integers(0, KEPT, (N - KEPT, NEAR)), gate, *mlp)


def head(whole: Learned | Retain | None, bits: int | np.ndarray, axes: np.ndarray | None = None) -> Head:
    table = np.broadcast_to(bits, (33, len(GROUPS))) if np.ndim(bits) else np.full((33, len(GROUPS)), bits)
    return Head(RNG.standard_normal(D).astype(np.float32), GROUPS, table.astype(np.uint8), axes, whole)


@pytest.mark.parametrize("whole", [Learned(matrix()), retain(), retain(H)], ids=["learned", "retain", "retain with MLP"])
def test_a_lossless_table_gives_the_tile_back(whole):
    coder = head(whole, F32, np.linalg.qr(RNG.standard_normal((D, D)))[0].astype(np.float32) if isinstance(whole, Learned) else None)
    for h, w in ((8, 8), (3, 8), (1, 1)):  # short tiles keep the DCT
        x = X[: h * w]
        assert coder.decode(coder.encode(x, h, w), h, w) == pytest.approx(x, abs=2e-5)
    plain = head(None, F32)
    short = Head(plain.mean, GROUPS, plain.table, None, whole)
    assert short.encode(X[:24], 3, 8).tobytes() == plain.encode(X[:24], 3, 8).tobytes() != short.encode(X, 8, 8).tobytes()


def test_learned_rows_are_products_with_the_matrix():
    t = matrix()
    coder = head(Learned(t), 4)
    rows = coder.rows(X, 8, 8)
    for r in (0, 7, 63):
        assert rows[r] == pytest.approx(sum(float(t[r, i]) * (X[i] - coder.mean) for i in range(N)), abs=1e-4)
    assert np.square(rows).sum() == pytest.approx(np.square(X - coder.mean).sum(), rel=1e-5)  # so errors are those of the rows


@pytest.mark.parametrize("h", [0, H])
def test_dropped_tokens_are_rebuilt_from_kept_ones(h):
    r = retain(h)
    bits = np.where(np.arange(33) <= KEPT // 2, 6, 0)[:, None]
    coder = head(r, bits)
    data = coder.encode(X, 8, 8)
    read, rows = coder.decode(data, 8, 8), coder.load(data, 8, 8)
    assert not rows[KEPT:].any()
    for i in range(KEPT):
        assert read[r.order[i]] == pytest.approx(rows[i] + coder.mean, abs=1e-5)
        assert read[r.order[i]] == pytest.approx(X[r.order[i]], abs=0.3)
    for j in range(N - KEPT):
        want = coder.mean.astype(np.float64).copy()
        near = [rows[n].astype(np.float64) for n in r.near[j]]
        for k in range(NEAR):
            want += r.gate[j, k] * near[k]
        for u in range(h):
            hidden = r.bias[u] + sum(float(r.up[u, k * D + c]) * near[k][c] for k in range(NEAR) for c in range(D))
            want += r.down[:, u] * max(hidden, 0)
        assert read[r.order[KEPT + j]] == pytest.approx(want, abs=1e-4)


def test_what_is_left_is_taken_from_what_kept_tokens_are_read_as():
    """So the errors of rows are those of tokens, however coarse the kept rows are."""
    r, kept = retain(H), np.arange(33)[:, None] <= KEPT // 2
    for left in (F16, 3, 0):
        coder = head(r, np.where(kept, 2, left))
        rows, data = coder.rows(X, 8, 8), coder.encode(X, 8, 8)
        error = np.square(coder.load(data, 8, 8) - rows).sum()
        assert np.square(coder.decode(data, 8, 8) - X).sum() == pytest.approx(error, rel=1e-4) and error > 1


def test_both_channels_of_a_lane_have_one_gate():
    groups = key_groups(80, "norm", 36)  # 16 + 2 pairs, then 44 channels without RoPE
    gate = RNG.standard_normal((2, 16 * len(groups))).astype(np.float32)
    out = gate_of_channels(gate, groups)
    assert out.shape == (2, 80)
    for i, group in enumerate(groups):
        for lane, (a, b) in enumerate(group.T):
            assert (out[:, a] == gate[:, 16 * i + lane]).all() and (out[:, b] == gate[:, 16 * i + lane]).all()


@pytest.fixture(scope="module")
def fitted(models):
    data = source(models(arch="llama"), 5)
    return data.samples[4], {codec: fit_tile_capsule(data.model, data.samples[:4], codec) for codec in CODECS}


def read_back(capsule, sample, tier):
    """Squared error over energy of keys and of values in the whole tiles of the first layer."""
    out = []
    for kind, x in (("k", sample.keys[0]), ("v", sample.values[0])):
        tile = x.reshape(16, 16, *x.shape[1:])[:8, :8].reshape(64, *x.shape[1:])
        heads = capsule.heads(0, kind, tier)
        errors = [np.square(h.decode(h.encode(tile[:, n], 8, 8), 8, 8) - tile[:, n]).sum() for n, h in enumerate(heads)]
        out.append(sum(errors) / np.square(tile - tile.mean(0)).sum())
    return out


def test_fitted_transforms_store_a_new_picture(fitted, tmp_path):
    """At the bytes that the DCT takes; smooth keys are what neighbours predict well."""
    sample, capsules = fitted
    for codec, capsule in capsules.items():
        path = write_tile_capsule(tmp_path / f"{codec}.gguf", capsule)
        again = read_tile_capsule(path)
        assert again.smaller == pytest.approx(SMALLER, rel=0.05) and again.provenance["codec"] == codec
        errors = np.array([read_back(again, sample, tier) for tier in (2, 6, 9)])
        assert (np.diff(errors, axis=0) < 0).all() and errors[0].max() < 0.3 and errors[2].max() < 1e-3, codec
        assert (again.layers[0].k_near is not None) == (codec == "retain") and (again.layers[0].v_transform is None) == (codec == "dct")


def test_gates_are_ridge_regressions():
    rng = np.random.default_rng(1)
    x, near = rng.standard_normal((2, 3, 5, 40)).astype(np.float32), np.array([[0, 2], [4, 1]])
    true = rng.standard_normal((2, 2, 2, 3))
    y = np.einsum("hjkl,hljkt->hljt", true, x[:, :, near])
    assert fit_gates(x, y.astype(np.float32), near, 1e-9) == pytest.approx(true, abs=1e-3)
    assert fit_gates(x, y.astype(np.float32), near, 1e9) == pytest.approx(np.full(true.shape, 0.5), abs=1e-3)  # the mean of the neighbours


def test_a_pyramid_gives_early_layers_more(fitted, models):
    data = source(models(arch="llama"), 3)
    capsule = fit_tile_capsule(data.model, data.samples, layers="pyramid")
    bits = [np.mean([t.mean() for t in (layer.k_table[4], layer.v_table[4])]) for layer in capsule.layers]
    assert bits[0] > 1.3 * bits[-1]


def test_a_key_mlp_predicts_what_gates_can_not():
    pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 1, 64, D)).astype(np.float32)
    options = RetainOptions(mlp=16, steps=200)
    plain = fit_retain(x, GROUPS, replace(options, mlp=0))
    order, near = plain["k_order"], plain["k_near"]
    for j in range(N - KEPT):  # a dropped token is a kink in one of its neighbours
        x[:, :, order[KEPT + j]] = np.maximum(x[:, :, order[near[j, 0]]], 0)
    errors = []
    for h in (0, 16):
        tensors = fit_retain(x, GROUPS, replace(options, mlp=h))
        r = whole_of(tensors, "k", 0, GROUPS)
        errors.append(np.square(r.predict(x[:, 0, r.order[:KEPT]]) - x[:, 0, r.order[KEPT:]]).mean())
    assert errors[1] < 0.97 * errors[0]

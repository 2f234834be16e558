"""Rows, PCA, retain and whole blocks, against loops written from docs/reference/format-v1.md and against what must come back unchanged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from make_capsule import random_capsule

from kvcapsule_gguf.codec.guard import block_score, token_ratio
from kvcapsule_gguf.codec.hadamard import hadamard, hadamard_size
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.codec.rope import apply_rope, axis_of_pair, tie_pairs
from kvcapsule_gguf.codec.rows import decode_rows, encode_rows, round_trip
from kvcapsule_gguf.codec.types import ROW_TYPES, legal, row_counts, rows_bytes, total_rows
from kvcapsule_gguf.format.block import BlockCodec
from kvcapsule_gguf.format.reader import read_capsule

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# --- Hadamard ---


def sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(n)


@pytest.mark.parametrize(("d", "n"), [(64, 64), (128, 128), (96, 32), (80, 16), (256, 256), (33, 1)])
def test_hadamard(d, n):
    x = normal(5, 3, d)
    assert hadamard_size(d) == n
    expected = (x.reshape(5, 3, d // n, n) @ sylvester(n)).reshape(x.shape)
    assert np.allclose(hadamard(x), expected, atol=1e-5)
    assert np.allclose(hadamard(hadamard(x)), x, atol=1e-5)


# --- rows ---

counts_for = st.tuples(*[st.integers(0, 6)] * 5).filter(lambda c: sum(c) > 0)


@settings(max_examples=60, deadline=None)
@given(counts_for, st.sampled_from([32, 64, 80, 96, 128]), st.integers(0, 2**32 - 1))
def test_rows(counts, d, seed):
    """Every row comes back from its own bytes, in the fixed order, by the quantizer of its type alone."""
    counts = legal(counts, d)
    x = np.random.default_rng(seed).standard_normal((2, 3, total_rows(counts), d)).astype(np.float32)
    data = encode_rows(x, counts)
    assert data.dtype == np.uint8 and data.shape == (2, 3, rows_bytes(counts, d))
    y = decode_rows(data, counts, d)
    at = row = 0
    for row_type, n in zip(ROW_TYPES, counts):
        for _ in range(n):
            raw = data[..., at : at + row_type.row_bytes(d)].reshape(6, -1)
            alone = DECODE[row_type.name](raw, d).reshape(2, 3, d)
            assert np.array_equal(y[:, :, row], hadamard(alone) if row_type.quantized else alone)
            at, row = at + row_type.row_bytes(d), row + 1
    assert at == data.shape[-1]


def test_sizes():
    """Bytes per row as ggml_row_size: 4d, 2d, d/32 * 34, d/32 * 18, d/64 * 18."""
    assert [t.row_bytes(128) for t in ROW_TYPES] == [512, 256, 136, 72, 36]
    assert legal((0, 0, 1, 2, 3), 64) == (0, 0, 1, 2, 3)
    assert legal((0, 0, 1, 2, 3), 96) == (0, 0, 1, 5, 0)
    assert legal((0, 0, 1, 2, 3), 80) == (0, 6, 0, 0, 0)
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_rows(normal(1, 1, 96), row_counts(q2_0=1))


def test_rotation_tames_outliers():
    """One channel far above the others, as keys have it: without the rotation q4_0 loses the other 31 values of its block."""
    x = normal(1, 200, 128)
    x[..., 7] *= 40
    others = np.arange(128) != 7

    def error(y: np.ndarray) -> float:
        return float(np.square(y - x[0])[:, others].sum())

    assert error(round_trip(x, row_counts(q4_0=200))[0]) < 0.5 * error(DECODE["q4_0"](ENCODE["q4_0"](x[0]), 128))


# --- blocks ---


@pytest.fixture
def capsule(models, tmp_path):
    def make(head: int = 64, **options):
        return read_capsule(random_capsule(models(head=head), tmp_path / "c.gguf", **options))

    return make


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def decode_loop(codec: BlockCodec, k_rows: np.ndarray, v_rows: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """docs/reference/format-v1.md, "Decoding a block", one number at a time in f64; rows [H, R, d] -> K_hat, V_hat [H, N, d]."""
    x = codec.layer
    n = len(x.v_basis)
    values = np.zeros((x.head_count_kv, n, x.value_length))
    keys = np.zeros((x.head_count_kv, n, x.key_length))
    for h in range(x.head_count_kv):
        for t in range(n):
            values[h, t] = x.v_mean[h] + sum(float(x.v_basis[r][t]) * v_rows[h, r].astype(float) for r in range(len(v_rows[h])))
            if codec.key_codec == 0:
                keys[h, t] = x.k_mean[h] + sum(float(x.k_basis[r][t]) * k_rows[h, r].astype(float) for r in range(len(k_rows[h])))
        if codec.key_codec == 1:
            m = x.kept_count
            for i in range(m):
                keys[h, x.token_order[i]] = k_rows[h, i]
            for j in range(n - m):
                near = [k_rows[h, x.k_neighbours[j, i]].astype(float) for i in range(neighbours)]
                out = sum(x.k_gate[h, j, i].astype(float) * near[i] for i in range(neighbours))
                for w in range(x.mlp_width):
                    z = float(np.dot(x.k_mlp_up[h, w].astype(float), np.concatenate(near))) + float(x.k_mlp_up_bias[h, w])
                    out = out + x.k_mlp_down[h, :, w].astype(float) * gelu(z)
                if m + j < len(k_rows[h]):
                    out = out + k_rows[h, m + j]
                keys[h, x.token_order[m + j]] = out
    return keys, values


OPTIONS = [
    {},
    {"lossless": False},
    {"rows": (0, 2, 2, 2, 2)},
    {"key_codec": "retain"},
    {"key_codec": "retain", "mlp_width": 8, "neighbours": 4},
    {"key_codec": "retain", "mlp_width": 8, "lossless": False},
    {"key_codec": "retain", "kept": 5, "rows": (0, 2, 2, 2, 2), "neighbours": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head", [64, 80, 96])
def test_decoding_is_what_the_format_says(capsule, head, options):
    c = capsule(head, **options)
    codec = BlockCodec.of(c, 1, 1)
    k, v = normal(2, c.block_size, head), normal(2, c.block_size, head)
    k_data, v_data = codec.encode_keys(k), codec.encode_values(v)
    assert k_data.shape[-1] * 2 + v_data.shape[-1] * 2 == codec.slot_bytes
    rows = decode_rows(k_data, codec.key_rows, head), decode_rows(v_data, codec.value_rows, head)
    k_loop, v_loop = decode_loop(codec, *rows, c.neighbour_count)
    assert np.allclose(codec.decode_keys(k_data), k_loop, atol=2e-5)
    assert np.allclose(codec.decode_values(v_data), v_loop, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"basis": "identity"}, {"key_codec": "retain"}, {"key_codec": "retain", "mlp_width": 8}], ids=str)
@pytest.mark.parametrize("head", [64, 80, 96])
@pytest.mark.parametrize("tier", [0, 1])
def test_lossless(capsule, head, options, tier):
    """All rows f32: a block decodes to itself."""
    c = capsule(head, **options)
    k, v = normal(3, 2, c.block_size, head), normal(3, 2, c.block_size, head)
    k_hat, v_hat = BlockCodec.of(c, 0, tier).round_trip(k, v)
    assert np.abs(k_hat - k).max() < 1e-5 and np.abs(v_hat - v).max() < 1e-5


def test_residuals(capsule):
    """Kept tokens carry the error of their own type only; a 2-bit residual takes most of the error off the dropped ones."""
    layer = capsule(64, key_codec="retain", kept=8).layers[0]
    kept, dropped = layer.token_order[:8], layer.token_order[8:]
    k = normal(2, 16, 64)

    def error(rows: tuple[int, ...], tokens: np.ndarray) -> float:
        codec = BlockCodec(layer, 1, rows, row_counts(f32=16))
        return float(np.square(codec.decode_keys(codec.encode_keys(k)) - k)[:, tokens].mean())

    coarse, with_residuals = (4, 0, 0, 4, 0), (4, 0, 0, 4, 8)
    assert error(coarse, kept[:4]) == error(with_residuals, kept[:4]) == 0
    assert 0 < error(coarse, kept[4:]) == error(with_residuals, kept[4:]) < 0.02
    assert error(with_residuals, dropped) < 0.2 * error(coarse, dropped)


def test_residuals_are_of_what_will_be_read(capsule):
    """Kept rows in q4_0, residuals in q4_0 of the prediction from these rows: their error is that of q4_0 and not that of two of them."""
    layer = capsule(64, key_codec="retain", kept=8).layers[0]
    layer.k_gate[:] = 1  # the prediction is the sum of two kept tokens and has the error of both
    codec = BlockCodec(layer, 1, row_counts(q4_0=16), row_counts(f32=16))
    k = normal(40, 2, 16, 64)
    data = codec.encode_keys(k)
    rows = decode_rows(data, codec.key_rows, 64)
    residual = rows[..., 8:, :] - (k[..., layer.token_order[8:], :] - rows[..., layer.k_neighbours, :].sum(-2))
    assert np.allclose(codec.decode_keys(data)[..., layer.token_order[8:], :] - k[..., layer.token_order[8:], :], residual, atol=1e-5)


def test_fewer_rows_are_worse_and_smaller(capsule):
    x = normal(2, 16, 64), normal(2, 16, 64)
    errors, sizes = [], []
    for rows in ((0, 0, 4, 12, 0), (0, 0, 4, 4, 8), (0, 0, 4, 4, 0), (0, 0, 0, 0, 4)):
        codec = BlockCodec.of(capsule(64, rows=rows), 0, 1)
        errors.append(np.square(codec.round_trip(*x)[0] - x[0]).mean())
        sizes.append(codec.slot_bytes)
    assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True)


# --- guard ---


def test_guard_score_of_q4_0_is_one():
    k, v = normal(2, 16, 64), normal(2, 16, 64)
    q4 = row_counts(q4_0=16)
    weight = np.ones((2, 64), np.float32)
    assert np.allclose(block_score(k, v, round_trip(k, q4), round_trip(v, q4), weight), 1)
    assert block_score(k, v, k, v, weight) == 0


def test_guard_sees_the_worst_token():
    """A single bad token, anywhere, in keys or in values, sets the score."""
    k, v = normal(5, 2, 16, 64), normal(5, 2, 16, 64)
    for t in (0, 7, 15):
        for which in range(2):
            bad = [k.copy(), v.copy()]
            bad[which][3, :, t] += 0.5
            score = block_score(k, v, *bad, np.ones((2, 64), np.float32))
            assert (score > 0).tolist() == [False, False, False, True, False]
            assert score[3] == token_ratio((k, v)[which], bad[which])[3, t] > 10


def test_guard_measures_by_no_accident():
    """Tokens of nothing, and tokens that q4_0 stores exactly: an error that is small beside the block's other tokens is no distortion."""
    rng = np.random.default_rng(8)
    k = rng.standard_normal((1, 2, 16, 64)).astype(np.float32)
    k[0, :, 3] *= 1e-9
    k[0, :, 5] = 8 * np.eye(64, dtype=np.float32)[0]  # rotated: the same number 64 times
    noise = rng.standard_normal(k.shape).astype(np.float32)
    score = [block_score(k, k, (k + e * noise).astype(np.float32), k, np.ones((2, 64), np.float32))[0] for e in (0.01, 0.1, 1.0)]
    assert score[0] < 0.2 and score[1] == pytest.approx(10, rel=0.5) and score[2] > 100


def test_guard_weighs_keys_by_queries():
    k = normal(2, 16, 64)
    wrong = k.copy()
    wrong[..., 5] += 1
    weight = np.ones((2, 64), np.float32)
    weight[:, 5] = 0
    assert block_score(k, k, wrong, k, weight) == 0
    assert block_score(k[..., :24], k[..., :24], 0 * k[..., :24], k[..., :24], weight[:, :24]) == 0  # no rival


# --- RoPE ---


@pytest.mark.parametrize("kind", ["norm", "neox", "mrope", "imrope"])
def test_rope(kind):
    """Products of rotated vectors depend on the distance only; the inverse undoes it; position 0 changes nothing."""
    sections = (8, 12, 12, 0) if "mrope" in kind else (0, 0, 0, 0)
    options = {"rope_type": kind, "sections": sections}
    q, k = normal(1, 64), normal(1, 64)

    def product(a: int, b: int) -> float:
        return float((apply_rope(q, np.array([a]), **options) * apply_rope(k, np.array([b]), **options)).sum())

    assert math.isclose(product(17, 5), product(112, 100), abs_tol=1e-3) and abs(product(17, 5) - product(17, 9)) > 1e-3
    x = normal(3, 6, 64)
    at = np.arange(6)[:, None] * np.array([[1, 2, 3, 0]]) if "mrope" in kind else np.arange(6)
    assert np.allclose(apply_rope(apply_rope(x, at, **options), at, inverse=True, **options), x, atol=1e-5)
    assert np.array_equal(apply_rope(x, 0 * at, **options), x)
    assert np.array_equal(apply_rope(x, at, n=32, **{**options, "sections": (4, 6, 6, 0)})[..., 32:], x[..., 32:])


def test_rope_sections():
    assert axis_of_pair("mrope", 64, (8, 12, 12, 0)).tolist() == [0] * 8 + [1] * 12 + [2] * 12
    assert axis_of_pair("imrope", 12, (2, 2, 2, 0)).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", ["norm", "neox", "mrope"])
def test_tied_gates_commute_with_rope(kind):
    """The reason for tying: a gate that is equal within a frequency pair may be applied before or after the rotation."""
    gate, x = tie_pairs(normal(64), kind), normal(4, 64)
    options = {"rope_type": kind, "sections": (8, 12, 12, 0)}
    at = np.arange(4)
    assert np.allclose(apply_rope(gate * x, at, **options), gate * apply_rope(x, at, **options), atol=1e-5)
    untied = normal(64)
    assert not np.allclose(apply_rope(untied * x, at, **options), untied * apply_rope(x, at, **options), atol=1e-2)

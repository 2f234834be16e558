"""The Hadamard transform and RoPE of the numpy codec, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcapsule_gguf.codec.hadamard import hadamard, hadamard_size
from kvcapsule_gguf.codec.rope import apply_rope, axis_of_pair, tie_pairs

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


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

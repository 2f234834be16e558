"""Keys of `pca` that are not rebuilt: the base views of a query, and its products with rows as they are stored, against numpy."""

from __future__ import annotations

import ctypes

import native_code
import numpy as np
import pytest
from test_codec_quantize import GGML_TYPE

from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.train.speed import base_views

ENERGY = 1e-5  # of the views that are left out, see llama-capsule-views.cpp
PRODUCTS = 1.5e-4  # mean square error of products with queries in 8 bits, by that of products of independent vectors of these lengths


@pytest.fixture(scope="module")
def lib(kernels, tmp_path_factory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("project") / "project.so"
    return ctypes.CDLL(str(native_code.build(native_code.NATIVE / "capsule_project.cpp", out, "-O2", "-shared", "-fPIC", *kernels)))


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def angles(name: str, n: int, n_rot: int) -> np.ndarray:
    """[n, n_rot / 2] by which RoPE turns the tokens of a block away from the first one."""
    f = np.arange(n_rot // 2)
    j = np.arange(n)
    if name == "line":
        return j[:, None] * 1e4 ** (-2 * f / n_rot)
    y, x = np.divmod(j, 8)
    return np.where(f % 3 == 1, y[:, None], np.where(f % 3 == 2, x[:, None], 0)) * 1e6 ** (-2 * f / n_rot)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("d", [64, 96])
@pytest.mark.parametrize("name", ["line", "tile"])
def test_views(lib, name, d, norm):
    """They say what a rotation does, up to the energy that is left out."""
    n, n_rot = 48, 64
    angle = angles(name, n, n_rot)
    order = np.argsort(np.r_[0:n_rot:2, 1:n_rot:2]) if norm else np.arange(n_rot)
    cs = np.ascontiguousarray(np.concatenate([np.cos(angle), np.sin(angle)], 1)[:, order], np.float32)
    phi, turn, still = np.zeros((n, n), np.float32), np.zeros((n, n_rot), np.float32), np.zeros(n, np.float32)
    m = lib.views(n, n_rot, norm, d, pointer(cs), pointer(phi), pointer(turn), pointer(still))
    assert 1 < m < n / 2 and m == base_views(angle, (d - n_rot) // 2)
    phi, turn, still = phi[:m], turn[:m], still[:m]
    np.testing.assert_allclose(phi @ phi.T, np.eye(m), atol=1e-6)

    back = turn[:, np.argsort(order)]
    ours = phi.T @ (back[:, : n_rot // 2] + 1j * back[:, n_rot // 2 :])
    left = (abs(ours - np.exp(-1j * angle)) ** 2).sum() + (d - n_rot) / 2 * ((phi.T @ still - 1) ** 2).sum()
    assert left <= ENERGY * n * d / 2 * 1.01


def test_eigen(lib):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12)) * 10.0 ** -np.arange(12)
    a = x @ x.T
    values, vectors = np.zeros(40), np.zeros((40, 40))
    lib.eigen(40, pointer(a), pointer(values), pointer(vectors))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a)[::-1], atol=1e-12 * values[0])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(40), atol=1e-12)
    np.testing.assert_allclose(vectors.T * values @ vectors, a, atol=1e-12 * values[0])


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q2_0"])
@pytest.mark.parametrize(("d", "n_rot", "norm"), [(64, 64, False), (128, 128, True), (128, 64, False), (192, 128, False), (256, 256, True)])
@pytest.mark.parametrize(("n_rows", "n_v"), [(1, 1), (8, 2), (9, 7), (36, 22)])
def test_products(lib, name, d, n_rot, norm, n_rows, n_v):
    rng = np.random.default_rng(n_rows)
    x, mean = rng.standard_normal((n_v, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    x[:, 3] *= 10
    turn, still = rng.standard_normal((n_v, n_rot)).astype(np.float32), rng.standard_normal(n_v).astype(np.float32)
    rows = ENCODE[name](rng.standard_normal((n_rows, d)).astype(np.float32))
    rows = np.ascontiguousarray(rows).view(np.uint8)

    ld = n_rows + 15
    out, means = np.zeros((n_v, ld), np.float32), np.zeros(n_v, np.float32)
    args = (pointer(a) for a in (x, turn, still, mean, rows, out))
    if not lib.products(GGML_TYPE[name], n_rows, d, n_rot, norm, n_v, *args, ld, pointer(means)):
        pytest.skip("no such kernel for this machine")

    half = n_rot // 2
    pairs = (np.arange(0, n_rot, 2), np.arange(1, n_rot, 2)) if norm else (np.arange(half), np.arange(half, n_rot))
    a, b, c, s = x[:, pairs[0]], x[:, pairs[1]], turn[:, pairs[0]], turn[:, pairs[1]]
    view = x * still[:, None]
    view[:, pairs[0]], view[:, pairs[1]] = a * c - b * s, a * s + b * c
    np.testing.assert_allclose(means, view @ mean, rtol=1e-4, atol=1e-3)

    decoded = DECODE[name](rows, d)
    error = out[:, :n_rows] - hadamard(view) @ decoded.T
    assert (error**2).mean() <= PRODUCTS * (view**2).sum(1).mean() * (decoded**2).mean()


@pytest.mark.parametrize(("n_rows", "n_out", "n_v"), [(1, 8, 1), (15, 48, 4), (64, 64, 22), (63, 72, 30), (256, 256, 5)])
def test_project(lib, n_rows, n_out, n_v):
    rng = np.random.default_rng(n_v)
    basis = (rng.uniform(-1, 1, (n_rows, n_out)) * 32767 / n_rows**0.5).astype(np.int16)
    ld = n_rows + 15
    x = rng.standard_normal((n_v, ld)).astype(np.float32)
    scales, means = rng.standard_normal((2, n_v)).astype(np.float32)
    phi = rng.standard_normal((n_v, n_out)).astype(np.float32)
    out = np.full(n_out, np.nan, np.float32)
    args = (pointer(a) for a in (scales, means, phi, out))
    if not lib.project(n_rows, n_out, pointer(basis), ctypes.c_float(1 / 32767), n_v, pointer(x), ld, *args):
        pytest.skip("no such kernel for this machine")
    wanted = (phi * (means[:, None] + scales[:, None] * (x[:, :n_rows].astype(float) @ (basis / 32767)))).sum(0)
    np.testing.assert_allclose(out, wanted, atol=2e-4 * abs(wanted).max())

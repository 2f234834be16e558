"""The quantizers and the rotation in the vector units of this machine: byte for byte those of plain C++, and those of numpy."""

from __future__ import annotations

import ctypes

import native_code
import numpy as np
import pytest
from test_codec_quantize import GGML_TYPE, samples

from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.quantize import ENCODE
from kvcapsule_gguf.codec.types import ROW_TYPES

TYPES = {"f16": 1, **GGML_TYPE}


@pytest.fixture(scope="module")
def lib(kernels, tmp_path_factory) -> ctypes.CDLL:
    """tests/native/capsule_rows.cpp with the files that it tests."""
    out = native_code.build(native_code.NATIVE / "capsule_rows.cpp", tmp_path_factory.mktemp("rows") / "rows.so", "-O2", "-shared", "-fPIC", *kernels)
    lib = ctypes.CDLL(str(out))
    lib.quantize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    lib.rotate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return lib


def quantize(lib: ctypes.CDLL, simd: bool, name: str, x: np.ndarray) -> np.ndarray:
    """-> uint8 [n, bytes of a row]; what lies behind the rows stays as it is."""
    size = len(x) * next(t for t in ROW_TYPES if t.name == name).row_bytes(x.shape[1])
    out = np.full(size + 64, 0xA5, np.uint8)
    lib.quantize(simd, TYPES[name], x.ctypes.data, out.ctypes.data, *x.shape)
    assert (out[size:] == 0xA5).all()
    return out[:size].reshape(len(x), -1)


def at_the_limits(d: int) -> np.ndarray:
    """Values of q2_0 on the limits between two codes and beside them, with the largest positive, negative, or both."""
    rng = np.random.default_rng(1)
    limits = np.array([512 * f * k for f in (10, 12, 15, 18, 23, 32) for k in (1, 3) if 512 * f * k <= 32768])
    x = rng.choice(limits, (2000, d)) + rng.integers(-1, 2, (2000, d))
    x = np.minimum(x, 32768) * rng.choice([-1, 1], x.shape)
    x[:, ::64] = rng.choice([-1, 1], x[:, ::64].shape) * 32768
    x[::3, 5::64] = -x[::3, ::64]
    few = rng.random(x.shape) < rng.random((len(x), 1))
    few[:, ::64] = True
    return np.where(few, x, 0).astype(np.float32)


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_are_the_references(lib, name, d):
    if not next(t for t in ROW_TYPES if t.name == name).fits(d):
        return
    rng = np.random.default_rng(2)
    more = {
        "limits": at_the_limits(d),
        "limits, scaled": at_the_limits(d) * np.float32(2**-7),
        "signs": rng.choice([-1, 1], (100, d)).astype(np.float32),
        "three values": rng.integers(-1, 2, (300, d)).astype(np.float32),
        "subnormal": rng.standard_normal((100, d)).astype(np.float32) * np.float32(1e-39),
    }
    for kind, x in {**samples(d), **more}.items():
        x = np.ascontiguousarray(x)
        ours = quantize(lib, True, name, x)
        assert np.array_equal(ours, quantize(lib, False, name, x)), kind
        assert np.array_equal(ours, ENCODE[name](x)), kind


def test_wrong_numbers_do_no_harm(lib):
    """What is not finite has no right bytes, but stays inside its own."""
    x = np.random.default_rng(3).standard_normal((50, 128)).astype(np.float32)
    x[:40:2, 3] = np.nan
    x[1:40:3, 70] = np.inf
    x[40:, :] = -np.inf
    for name in TYPES:
        quantize(lib, True, name, x)


@pytest.mark.parametrize("d", [8, 32, 64, 96, 128, 256, 512])
def test_the_rotation_is_the_references(lib, d):
    x = np.random.default_rng(d).standard_normal((200, d)).astype(np.float32)
    n, results = d & -d, []
    for simd in (True, False):
        y = x.copy()
        lib.rotate(simd, y.ctypes.data, n, y.size)
        results.append(y)
    assert np.array_equal(*results) and np.array_equal(results[0], hadamard(x))

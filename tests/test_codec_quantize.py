"""Row quantizers: ggml's own bytes, and error bounds."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st

from kvcapsule_gguf.codec.quantize import DECODE, ENCODE

BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}  # of 32 values
FOLDERS = [ROOT / "kvcapsule_gguf" / "lib", ROOT / "kvcapsule_gguf" / "lib" / "stock", ROOT.parent / "build-stock" / "bin"]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    for folder in FOLDERS:
        for name in ("libggml-base.so", "libggml-base.dylib"):
            if (folder / name).exists():
                lib = ctypes.CDLL(str(folder / name))
                lib.ggml_type_name.restype = ctypes.c_char_p
                lib.ggml_quantize_chunk.restype = ctypes.c_size_t
                lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
                return lib
    pytest.skip("no libggml-base: run scripts/setup")


def ggml_type(lib: ctypes.CDLL, name: str) -> int:
    return next(i for i in range(100) if lib.ggml_type_name(i) == name.encode())


def samples(d: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(d)
    normal = rng.standard_normal((300, d)).astype(np.float32)
    return {
        "gaussian": normal,
        "wild": (normal * np.exp(3 * rng.standard_normal((300, d)))).astype(np.float32),
        "tiny": normal * np.float32(1e-7),
        "large": normal * np.float32(3e4),
        "integers": rng.integers(-127, 128, (300, d)).astype(np.float32),
        "halves": (rng.integers(-254, 255, (300, d)) / 2).astype(np.float32),
        "sparse": np.where(rng.random((300, d)) < 0.05, normal, 0).astype(np.float32),
        "zero": np.zeros((3, d), np.float32),
        "constant": np.full((3, d), 0.7, np.float32),
        "negative": -np.abs(normal),
    }


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_the_bytes_are_ggmls(ggml, name, d):
    for kind, x in samples(d).items():
        x = np.ascontiguousarray(x)
        theirs = np.zeros((len(x), d // 32 * BLOCK_BYTES[name]), np.uint8)
        ggml.ggml_quantize_chunk(ggml_type(ggml, name), x.ctypes.data, theirs.ctypes.data, 0, len(x), d, None)
        assert np.array_equal(ENCODE[name](x), theirs), kind


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_ggml_reads_our_bytes(ggml, name):
    """ggml's dequantizer, a C function in its table of type traits, returns what ours does."""

    class Traits(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("bytes", ctypes.c_size_t),
                    ("quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))]

    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = ggml.ggml_get_type_traits(ggml_type(ggml, name)).contents
    assert (traits.block, traits.bytes) == (32, BLOCK_BYTES[name])
    for kind, x in samples(128).items():
        data = ENCODE[name](x)
        theirs = np.zeros_like(x)
        traits.to_float(data.ctypes.data, theirs.ctypes.data, x.size)
        assert np.array_equal(DECODE[name](data, 128), theirs), kind


def relative_mse(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(y - x).sum() / np.square(x).sum())


@pytest.mark.parametrize(("name", "limit"), [("f32", 0), ("f16", 1e-7), ("q8_0", 4e-5), ("q4_0", 0.009)])
def test_gaussian_rows(name, limit):
    x = np.random.default_rng(0).standard_normal((5000, 128)).astype(np.float32)
    assert relative_mse(x, DECODE[name](ENCODE[name](x), 128)) <= limit


finite = st.floats(-60000, 60000, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=64, max_size=64))
def test_any_row(values):
    """Half a step (q4_0's range is -8..7: one step at its end)."""
    x = np.array([values], np.float32)
    steps = {"q8_0": (127, 0.5), "q4_0": (8, 1.0)}
    for name, (levels, limit) in steps.items():
        blocks = x.reshape(-1, 32)
        step = np.abs(blocks).max(1) / levels
        error = np.abs(DECODE[name](ENCODE[name](x), 64).reshape(-1, 32) - blocks).max(1)
        # the scale is rounded to f16: 2^-11 of the value, at worst 2^-25 (subnormal) of each of `levels` steps
        assert (error <= limit * step + np.abs(blocks).max(1) * 2**-11 + levels * 2.0**-24).all()


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_a_sign_or_a_power_of_two_changes_nothing(name):
    """Rows times 2 give codes alike and values times 2."""
    x = np.random.default_rng(5).standard_normal((200, 64)).astype(np.float32)
    y = DECODE[name](ENCODE[name](x), 64)
    assert np.array_equal(DECODE[name](ENCODE[name](2 * x), 64), 2 * y)
    if name != "q4_0":
        assert np.array_equal(DECODE[name](ENCODE[name](-x), 64), -y)

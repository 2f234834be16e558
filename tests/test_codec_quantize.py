"""Row quantizers: ggml's own bytes, error bounds, and the q2_0 rule against a brute-force search."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st

from kvcapsule_gguf.codec.q2_0 import search
from kvcapsule_gguf.codec.quantize import DECODE, ENCODE
from kvcapsule_gguf.codec.types import Q2_0, Q4_0, Q8_0, ROW_TYPES

GGML_TYPE = {"q4_0": 2, "q8_0": 8, "q2_0": 42}
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
    row_type = next(t for t in ROW_TYPES if t.name == name)
    for kind, x in samples(d).items():
        x = np.ascontiguousarray(x)
        theirs = np.zeros((len(x), row_type.row_bytes(d)), np.uint8)
        ggml.ggml_quantize_chunk(ggml_type(ggml, name), x.ctypes.data, theirs.ctypes.data, 0, len(x), d, None)
        assert np.array_equal(ENCODE[name](x), theirs), kind


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q2_0"])
def test_ggml_reads_our_bytes(ggml, name):
    """ggml's dequantizer, a C function in its table of type traits, returns what ours does."""

    class Traits(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("bytes", ctypes.c_size_t),
                    ("quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))]

    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = ggml.ggml_get_type_traits(ggml_type(ggml, name)).contents
    row_type = next(t for t in ROW_TYPES if t.name == name)
    assert (traits.block, traits.bytes) == (row_type.block, row_type.block_bytes)
    for kind, x in samples(128).items():
        data = ENCODE[name](x)
        theirs = np.zeros_like(x)
        traits.to_float(data.ctypes.data, theirs.ctypes.data, x.size)
        assert np.array_equal(DECODE[name](data, 128), theirs), kind


def relative_mse(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(y - x).sum() / np.square(x).sum())


@pytest.mark.parametrize(("name", "limit"), [("f32", 0), ("f16", 1e-7), ("q8_0", 4e-5), ("q4_0", 0.009), ("q2_0", 0.1240)])
def test_gaussian_rows(name, limit):
    """The project's limit for q2_0 is 0.13 (ggml's own quantizer: 0.516)."""
    x = np.random.default_rng(0).standard_normal((5000, 128)).astype(np.float32)
    assert relative_mse(x, DECODE[name](ENCODE[name](x), 128)) <= limit


def code_value(data: np.ndarray, j: int) -> float:
    """Value j of one q2_0 block, straight from the definition of the layout."""
    scale = float(np.frombuffer(data[:2].tobytes(), "<f2")[0])
    return ((int(data[2 + j // 4]) >> 2 * (j % 4) & 3) - 1) * scale


def test_q2_0_layout():
    x = np.random.default_rng(1).standard_normal((1, 128)).astype(np.float32)
    data = ENCODE["q2_0"](x)
    assert data.shape == (1, Q2_0.row_bytes(128)) == (1, 36)
    read = DECODE["q2_0"](data, 128)[0]
    assert [code_value(data[0, 18 * (j // 64) :], j % 64) for j in range(128)] == read.tolist()


@pytest.mark.parametrize("scale", [1.0, -0.37, 1000.0])
def test_q2_0_is_exact_on_its_own_values(scale):
    """A block made of the four levels comes back as it was, up to the f16 rounding of the scale (2^-11)."""
    codes = np.random.default_rng(2).integers(-1, 3, (50, 64)).astype(np.float32)
    x = codes * np.float32(scale)
    assert np.abs(DECODE["q2_0"](ENCODE["q2_0"](x), 64) - x).max() <= 2 * abs(scale) * 2**-11


def test_q2_0_is_near_the_optimum():
    """The best codes for a scale are the nearest levels; so the optimum over a dense grid of scales bounds what any search can find."""
    rng = np.random.default_rng(3)
    for x in itertools.chain(rng.standard_normal((20, 64)), rng.laplace(size=(20, 64)), rng.uniform(-1, 1, (20, 64))):
        best = np.inf
        for d in np.concatenate([np.linspace(-1, -0.05, 400), np.linspace(0.05, 1, 400)]) * np.abs(x).max():
            best = min(best, np.square(np.clip(np.floor(x / d + 0.5), -1, 2) * d - x).sum())
        scale, codes = search(x[None].astype(np.float32))
        assert np.square(codes[0] * scale[0] - x).sum() <= 1.08 * best


def test_q2_0_does_not_depend_on_its_neighbours():
    """A block is quantized the same alone and among 3000 others."""
    x = np.random.default_rng(4).standard_normal((3000, 64)).astype(np.float32)
    together = ENCODE["q2_0"](x)
    for i in (0, 1023, 1024, 2999):
        assert np.array_equal(ENCODE["q2_0"](x[i : i + 1])[0], together[i])


finite = st.floats(-60000, 60000, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=64, max_size=64))
def test_any_row(values):
    """Half a step for q8_0 and q4_0 (q4_0's range is -8..7: one step at its end), for q2_0 never more than storing zeros, and never a NaN."""
    x = np.array([values], np.float32)
    energy = np.square(x.astype(np.float64)).sum()
    steps = {Q8_0.name: (127, 0.5), Q4_0.name: (8, 1.0)}
    for name, (levels, limit) in steps.items():
        blocks = x.reshape(-1, 32)
        step = np.abs(blocks).max(1) / levels
        error = np.abs(DECODE[name](ENCODE[name](x), 64).reshape(-1, 32) - blocks).max(1)
        # the scale is rounded to f16: 2^-11 of the value, at worst 2^-25 (subnormal) of each of `levels` steps
        assert (error <= limit * step + np.abs(blocks).max(1) * 2**-11 + levels * 2.0**-24).all()
    y = DECODE["q2_0"](ENCODE["q2_0"](x), 64)
    assert np.isfinite(y).all()
    assert np.square(y.astype(np.float64) - x).sum() <= energy * (1 + 1e-6) + 64 * 2.0**-40


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q2_0"])
def test_a_sign_or_a_power_of_two_changes_nothing(name):
    """Rows times 2 give codes alike and values times 2; q2_0 has signed scales, so -x gives the negative."""
    x = np.random.default_rng(5).standard_normal((200, 64)).astype(np.float32)
    y = DECODE[name](ENCODE[name](x), 64)
    assert np.array_equal(DECODE[name](ENCODE[name](2 * x), 64), 2 * y)
    if name != "q4_0":
        assert np.array_equal(DECODE[name](ENCODE[name](-x), 64), -y)

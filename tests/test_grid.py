"""How wide a picture is whose positions do not tell: read from its keys, in numpy, in C++ and by the library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import native_code
import numpy as np
import pytest
from llama_runner import Case, compress, image_file, stats, text
from tiny_gguf import TinyModel

from kvcapsule_gguf.codec.tiles import cut_grid, cut_run, grid_width

RNG = np.random.default_rng(8)
N_EMBD = TinyModel(arch="llama").n_embd
# squares, 12 * 12 tokens and no square, a prime number of lines, long ones
GRIDS = [(16, 16), (9, 16), (16, 9), (18, 8), (8, 18), (11, 13), (24, 10), (37, 20), (13, 64), (64, 13), (40, 40)]


def field(height: int, width: int, channels: int = 12) -> np.ndarray:
    """f32 [height * width, channels]: waves in all directions, none shorter than 8 tokens, and a tenth of noise."""
    y, x = np.mgrid[0:height, 0:width].reshape(2, -1)
    out = 0.1 * RNG.standard_normal((height * width, channels))
    for _ in range(12):
        angle, length, phase = RNG.uniform([0, 8, 0], [2 * np.pi, 40, 2 * np.pi])
        out += np.cos(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / length + phase)[:, None] * RNG.standard_normal(channels)
    return out.astype(np.float32)


def row_ends(x: np.ndarray, width: int) -> np.ndarray:
    """A token after each row but the last."""
    rows = x.reshape(-1, width, x.shape[-1])
    end = np.full((len(rows), 1, x.shape[-1]), 2.0, np.float32)
    return np.concatenate([rows, end], 1).reshape(-1, x.shape[-1])[:-1]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "grid.so"
    done = native_code.run(native_code.compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{native_code.ROOT / 'patches' / 'files' / 'src'}", native_code.NATIVE / "grid.cpp", "-o", out)
    assert done.returncode == 0, done.stderr
    call = ctypes.CDLL(str(out)).grid_width
    call.restype, call.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return lambda x: call(x.ctypes.data, *x.shape)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_width_of_a_smooth_picture_is_found(native, grid):
    for _ in range(5):
        x = field(*grid)
        assert grid_width(x) == native(x) == grid[1]
        y = row_ends(x, grid[1])
        assert grid_width(y) == native(y) == grid[1] + 1


def test_any_picture_has_the_same_width_in_numpy_and_in_the_library(native):
    for n in [*range(1, 90), 144, 255, 256, 600]:
        x = RNG.standard_normal((n, 6)).astype(np.float32)
        assert grid_width(x) == native(x), n


def test_what_is_smooth_along_the_line_alone_stays_in_lines_of_8(native):
    x = np.cumsum(RNG.standard_normal((480, 8)), 0).astype(np.float32)
    assert grid_width(x) == native(x) == 8


@pytest.fixture(scope="module")
def tiles_of(models, capsules, patched, tmp_path_factory):
    """How many slots the library makes of a picture, embeddings f32 [n, n_embd], where every token has one position."""
    folder = tmp_path_factory.mktemp("pictures")

    def count(x: np.ndarray, **options: int) -> int:
        path = Path(folder, f"{len(list(folder.iterdir()))}.npy")
        np.save(path, x)
        model = models(arch="llama")
        script = [text(5), image_file(path, 1, len(x)), compress(), stats()]
        seen = patched([Case("a", model, script, capsule=capsules(model), **options)])["a"].values("stats")[0]
        assert seen["n_hot_vision"] == 0
        return sum(seen["n_slots_tier"])

    return count


@pytest.mark.parametrize("grid", [(9, 16), (20, 12), (12, 20)])
def test_the_library_cuts_tiles_of_the_grid(tiles_of, grid):
    x = field(*grid, N_EMBD)
    assert len(cut_grid(*grid)) != len(cut_run(len(x)))
    assert tiles_of(x) == len(cut_grid(*grid))


def test_pictures_of_a_known_square_size_are_squares(tiles_of):
    x = field(9, 36, N_EMBD)
    assert tiles_of(x, image_tokens=324) == len(cut_grid(18, 18)) != len(cut_grid(9, 36))

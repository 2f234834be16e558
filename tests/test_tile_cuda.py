"""The CUDA kernels of GGML_OP_CAPSULE on the CPU (tests/native/cuda_on_cpu.h) against numpy, and through nvcc where there is one."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import replace
from pathlib import Path

import native_code
import numpy as np
import pytest
from test_tile_op import BASE, CASES
from tile_op import Data, Params, Setting, V, at, helper

from kvcapsule_gguf.codec.quantize import ENCODE

WARP = 32
LANES = 16
TYPES = {"f32": (0, 4), "f16": (1, 2)}  # enum capsule_type, bytes


class Channels(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("d", "n_rot", "halves")]


class Tensor(ctypes.Structure):
    """struct capsule_tensor."""

    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int), *((name, ctypes.c_int64) for name in ("nb0", "nb1", "nb2"))]

    @classmethod
    def of(cls, x: np.ndarray, type_: str = "f32", axes: tuple[int, ...] = (2, 1, 0)) -> Tensor:
        """axes: which of numpy's axes are ne0, ne1, ne2."""
        strides = [x.strides[a] for a in axes] + [0] * (3 - len(axes))
        return cls(x.ctypes.data, TYPES[type_][0], *strides)


class Args(ctypes.Structure):
    """struct capsule_tile_args."""

    _fields_ = [
        ("p", Params), ("k", Channels), ("v", Channels), *((name, ctypes.c_int) for name in ("n_slots", "n_threads", "ld_angles")),
        *((name, ctypes.c_void_p) for name in ("pool", "slots", "tables", "angles")), *((name, ctypes.c_int) for name in ("n_head", "n_tokens", "n_kv")),
        *((name, Tensor) for name in ("q", "hot_k", "hot_v", "mask", "cold", "seen", "dst")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return helper(tmp_path_factory.mktemp("tile"))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    files = native_code.ROOT / "patches" / "files" / "ggml"
    flags = [f"-I{files / 'src'}", f"-I{files / 'include'}", f"-I{native_code.source() / 'ggml' / 'include'}", "-Wno-unknown-pragmas"]
    library = ctypes.CDLL(str(native_code.tiles("tile_cuda", tmp_path_factory.mktemp("cuda"), *flags)))
    library.tile_args_size.restype = ctypes.c_size_t
    assert library.tile_args_size() == ctypes.sizeof(Args)
    for name in ("tile_unpack", "tile_attn", "tile_combine"):
        getattr(library, name).restype = ctypes.c_bool
    return library


def groups(s: Setting, is_v: bool) -> int:
    paired = -(-(0 if is_v else s.rotated_channels) // (2 * LANES))
    plain = (s.d_v if is_v else s.d_k) - (0 if is_v else s.rotated_channels)
    return paired + -(-plain // (2 * LANES))


def args_of(data: Data, flags: int = 0) -> Args:
    s = data.s
    res = Args(p=data.params(flags), k=Channels(*s.channels), v=Channels(s.d_v, 0, int(s.rope != "norm")), n_slots=len(data.tiles))
    places = LANES * max(groups(s, False), groups(s, True))
    res.n_threads = -(-places // WARP) * WARP
    res.ld_angles = 2 * LANES * groups(s, False)
    res.pool, res.slots, res.tables, res.angles = at(data.pool), at(data.slots), at(data.packed), at(data.angles)
    return res


def unpack(cuda, data: Data, is_v: bool, type_: str = "f32") -> np.ndarray:
    s = data.s
    width = s.heads * (s.d_v if is_v else s.d_k)
    out = np.full((len(data.keys), width), np.nan, {"f32": "<f4", "f16": "<f2"}[type_])
    args = args_of(data, V if is_v else 0)
    args.dst = Tensor.of(out, type_, (1, 0))
    assert cuda.tile_unpack(ctypes.byref(args)), "barriers"
    return out.astype(np.float32).reshape(len(data.keys), s.heads, -1)


def attend(cuda, data: Data, parts: int) -> np.ndarray:
    s = data.s
    args = args_of(data)
    args.p.n_parts, args.n_head, args.n_tokens, args.n_kv = parts, s.heads * s.gqa, s.tokens, s.n_kv
    hot_k, hot_v = (ENCODE[s.cache](x.reshape(-1, x.shape[-1])).view("<f4" if s.cache == "f32" else "<f2").reshape(x.shape) for x in (data.hot_k, data.hot_v))
    hot_v = np.ascontiguousarray(hot_v.transpose(2, 1, 0)) if s.v_trans else hot_v
    mask = np.where(data.visible, 0, -np.inf)
    hot_mask, cold = mask[:, : s.n_kv].astype("<f4" if s.mask == "f32" else "<f2"), mask[:, s.n_kv :].astype("<f2")
    partial = np.full((parts, s.tokens * s.heads * s.gqa * (s.d_v + 2)), np.nan, np.float32)
    out = np.full((s.tokens, s.heads * s.gqa, s.d_v), np.nan, np.float32)
    args.q, args.hot_k, args.hot_v = Tensor.of(data.q), Tensor.of(hot_k, s.cache), Tensor.of(hot_v, s.cache, (0, 1, 2) if s.v_trans else (2, 1, 0))
    args.mask, args.cold = Tensor.of(hot_mask, s.mask, (1, 0)), Tensor.of(cold, "f16", (1, 0))
    args.seen = Tensor(data.seen.ctypes.data, 0, 1, data.seen.strides[0], 0)
    args.dst = Tensor(partial.ctypes.data, 0, 4, 0, partial.strides[0])
    assert cuda.tile_attn(ctypes.byref(args)), "barriers"
    args.q, args.dst = args.dst, Tensor.of(out)
    assert cuda.tile_combine(ctypes.byref(args))
    return out


# those with cosine transforms whose hot cells are not quantized; fibers are slow
FLOATS = {name: s for name, s in CASES.items() if s.codec == "dct" and s.cache in TYPES and not s.rotated and s.tokens < 64 and s.heads < 16 and s.d_k <= 128 and s.gqa < 8}


@pytest.mark.parametrize("name", FLOATS)
def test_attention(lib, cuda, name):
    data = Data(FLOATS[name], lib)
    want = data.attention()
    got = attend(cuda, data, parts=3)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 1e-4 * max(np.sqrt(np.square(want).mean()), 1e-3)


@pytest.mark.parametrize("name", ["neox", "norm, part of the head", "no rope", "m-rope", "yarn", "ragged grids", "no axes", "head size 100", "K and V of unlike sizes"])
@pytest.mark.parametrize("is_v", [False, True], ids=["K", "V"])
def test_unpack(lib, cuda, name, is_v):
    data = Data(FLOATS[name], lib)
    want = data.values if is_v else data.keys
    assert np.abs(unpack(cuda, data, is_v) - want).max() <= 3e-5 * np.abs(want).max()
    assert np.abs(unpack(cuda, data, is_v, "f16") - want).max() <= 1e-3 * np.abs(want).max()


def test_unpack_of_tokens_at_any_positions(lib, cuda):
    data = Data(replace(BASE, bent=True), lib)
    assert np.abs(unpack(cuda, data, is_v=False) - data.keys).max() <= 3e-5 * np.abs(data.keys).max()


def test_what_nobody_sees_does_not_matter(lib, cuda):
    data = Data(replace(BASE, tokens=1), lib)
    data.visible[:, 7] = False
    want = attend(cuda, data, 2)
    data.hot_k[7] = data.hot_v[7] = np.nan
    assert (attend(cuda, data, 2) == want).all()


def test_a_cell_that_is_not_a_number_is_not_hidden(lib, cuda):
    data = Data(BASE, lib)
    data.visible[:, 7] = True
    data.hot_k[7, 0, 0] = np.nan
    assert np.isnan(attend(cuda, data, 2)).any()


@pytest.mark.parametrize("name", ["capsule.cu", "ggml-cuda.cu"])
def test_the_cuda_code_compiles(tmp_path, name):
    """The kernels, without spilled registers, and the file with the hooks."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    folder = native_code.source() / "ggml" / "src" / "ggml-cuda"
    flags = ["-std=c++17", "-arch=sm_80", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128", *(f"-I{native_code.source() / inside}" for inside in ("ggml/include", "ggml/src")), f"-I{folder}"]
    if not (Path(nvcc).resolve().parents[1] / "include" / "cublas_v2.h").is_file():
        flags.append(f"-I{native_code.NATIVE / 'cublas_stub'}")
    done = native_code.run(nvcc, *flags, "-Xptxas", "-v", "-c", folder / name, "-o", tmp_path / "out.o")
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "capsule.cu":
        spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
        assert "capsule_attn_kernel" in done.stderr and spills and set(spills) == {"0"}

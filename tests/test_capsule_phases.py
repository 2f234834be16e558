"""The kernels of GGML_OP_CAPSULE are phases with barriers between them: the order of the threads in a phase, and their number, must not matter.

Also: real threads under the thread sanitizer, the CUDA kernels by nvcc, and the headers with the address spaces of Metal.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import native_code
import numpy as np
import pytest
from capsule_op import Data, Graph, V, constants, ggml, graph, params
from test_capsule_encode import CASES as ENCODE_CASES, Cells, both
from test_capsule_op import BASE, CASES, HEADS, of_rows
from test_capsule_query import EIGHT_BITS, PCA, RETAIN

from kvcapsule_gguf.codec.types import row_counts

SETTINGS = {
    "pca": of_rows(HEADS[128], "mixed"),
    "retain": replace(CASES["retain, q4_0 with residuals"], ragged=0.5, tokens=3),
    "one tier": replace(CASES["one tier"], tokens=7, n_kv=70),
    "sequences": CASES["8 sequences, groups of 3"],
    "rotated": replace(BASE, rotated=True),
}


@pytest.fixture(scope="module")
def lib(tmp_path_factory) -> ctypes.CDLL:
    """tests/native/capsule_order.cpp."""
    out = native_code.build(native_code.NATIVE / "capsule_order.cpp", tmp_path_factory.mktemp("order") / "order.so", "-O2", "-shared", "-fPIC")
    lib = ctypes.CDLL(str(out))
    lib.capsule_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    lib.capsule_parts.argtypes, lib.capsule_parts.restype = [ctypes.c_void_p], ctypes.c_void_p
    return lib


DEFAULT = 48 * 1024


def run(lib: ctypes.CDLL, node: int, threads: int, order: np.ndarray | None = None, shared: int = DEFAULT, *, most: int = 0, mma: bool = False) -> bytes:
    """The bytes of the result of a node. shared: bytes of shared memory; most: if many queries have vectors; mma: with what stands for tensor cores."""
    data, size = ggml().ggml_get_data(node), ggml().ggml_nbytes(node)
    ctypes.memset(data, 0xFF, size)
    order = None if order is None else np.ascontiguousarray(order, np.int32)
    most = max(shared, most)
    used = lib.capsule_run(node, threads, None if order is None else order.ctypes.data, shared, most, mma)
    assert 0 < used <= most or (used > 0 and shared < 32 * 1024)
    return ctypes.string_at(data, size)


def nodes(lib: ctypes.CDLL, g: Graph, data: Data) -> dict[str, int]:
    """The parts of attention, and unpack of K and of V."""
    s = data.s
    shared = constants(g, data)
    out = {}
    for name, flag, width in (("k", 0, s.heads * s.d_k), ("v", V, s.heads * s.d_v)):
        dst = g.tensor(np.zeros((s.n_slots * s.N, width), np.float32), "f32", width, s.n_slots * s.N)
        out[name] = ggml().ggml_capsule_unpack(g.context, ctypes.byref(params(s, flag)), dst, *shared)
    mask = np.where(data.visible, 0, -np.inf).astype(np.float32)
    q = g.tensor(data.q, "f32", *data.q.shape[::-1])
    hot = [g.tensor(x, "f32", *x.shape[::-1]) for x in (data.hot_k, data.hot_v)]
    masks = [g.tensor(m, "f32", *m.shape[::-1]) for m in (mask[:, : s.n_kv], mask[:, s.n_kv :])]
    combined = ggml().ggml_capsule_attn(g.context, ctypes.byref(params(s)), q, *hot, *masks, *shared)
    out["attention"] = lib.capsule_parts(combined)
    return out


@pytest.mark.parametrize("tile_f32", [True, False], ids=["f32", "f16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_order_of_the_threads_does_not_matter(lib, name, tile_f32):
    rng = np.random.default_rng(0)
    with graph() as g:
        for node in nodes(lib, g, Data.of(replace(SETTINGS[name], tile_f32=tile_f32))).values():
            expected = run(lib, node, 128)
            for order in (np.arange(128)[::-1], rng.permutation(128), rng.permutation(128)):
                assert run(lib, node, 128, order) == expected
            for threads in (32, 64, 256):
                assert run(lib, node, threads) == expected
            for shared in (32 * 1024, 20 * 1024, 0):  # smaller pieces
                assert run(lib, node, 128, shared=shared) == expected
                assert run(lib, node, 128, rng.permutation(128), shared) == expected


@pytest.mark.parametrize("s", [PCA, replace(RETAIN, tokens=3, ragged=0.5), replace(RETAIN, tokens=1, group=1)], ids=["pca", "retain", "one query"])
def test_nor_does_it_where_keys_are_not_rebuilt(lib, s):
    """With less memory there are fewer queries in a group, in the end the keys are rebuilt."""
    rng = np.random.default_rng(0)
    data = Data.of(replace(s, slots=(6, 3), tile_f32=False))
    data.first[2:5] = 0  # vectors that are kept from slot to slot
    with graph() as g:
        node = nodes(lib, g, data)["attention"]
        expected = run(lib, node, 128)
        rebuilt = run(lib, nodes(lib, g, rebuilding(data))["attention"], 128)
        assert expected != rebuilt
        for threads in (32, 64, 128, 256):
            assert run(lib, node, threads, rng.permutation(threads)) == expected
        found = [run(lib, node, 128, rng.permutation(128), shared) for shared in (40 * 1024, 32 * 1024, 24 * 1024, 16 * 1024, 12 * 1024, 0)]
        assert set(found) == {expected, rebuilt}


def test_many_queries_take_more_memory(lib):
    """A usual block of `retain`: 8 queries have vectors in the 227 KB of sm_90, 4 at a time in the 99 KB of sm_89, otherwise the keys are rebuilt. The numbers of docs/design/architecture.md."""
    rows = (row_counts(q4_0=26, q2_0=38),) * 2
    usual = replace(RETAIN, N=64, kept=26, d_k=128, d_v=128, n_rot=128, heads=1, slots=(2, 1), n_kv=0, rows_k=rows, rows_v=rows, tile_f32=False)
    rng = np.random.default_rng(0)
    with graph() as g:
        kb = lambda node, most: round(lib.capsule_run(node, 128, None, DEFAULT, most * 1024, 0) / 1024)  # noqa: E731
        one, two = (nodes(lib, g, Data.of(replace(usual, tokens=n, group=1)))["attention"] for n in (1, 2))
        assert (kb(one, 48), kb(two, 64)) == (43, 63)
        data = Data.of(replace(usual, tokens=2, group=4))
        node = nodes(lib, g, data)["attention"]
        assert [kb(node, most) for most in (227, 99, 64)] == [190, 99, 44]
        assert [round(lib.capsule_run(node, 128, None, DEFAULT, most * 1024, 1) / 1024) for most in (227, 163)] == [202, 117]  # values on tensor cores
        expected = run(lib, node, 128, shared=1 << 20)
        for most in (227, 99):
            assert run(lib, node, 256, rng.permutation(256), most=most * 1024) == expected
        assert run(lib, node, 128) != expected
        assert run(lib, nodes(lib, g, rebuilding(data))["attention"], 128) == run(lib, node, 128)


def rebuilding(data: Data) -> Data:
    """With keys that are rebuilt."""
    data.s = replace(data.s, query=False)
    return data


ENCODED = ("rotated q8_0 cache", "a usual block", "odd block", "retain", "retain, rotated q8_0 cache", "retain, a usual block")


@pytest.mark.parametrize("name", ENCODED)
def test_nor_do_slots_depend_on_it(lib, name):
    """Nor on how much of a block is in shared memory at a time."""
    rng = np.random.default_rng(0)
    for cells in both(ENCODE_CASES[name]):
        with graph() as g:
            encode, errors = cells.nodes(g)
            results = set()
            for threads, shared in ((128, DEFAULT), (128, 30 * 1024), (128, 0), (32, DEFAULT), (256, 0)):
                for order in (None, np.arange(threads)[::-1], rng.permutation(threads)):
                    # the errors read what was written just now
                    results.add((run(lib, encode, threads, order, shared), run(lib, errors, threads, order, shared) if errors else b""))
            assert len(results) == 1


PRODUCTS = {
    "pca": replace(of_rows(HEADS[128], "mixed"), ragged=0.2),
    "odd block": replace(of_rows(HEADS[128], "mixed"), N=24, ragged=0.2, rows_k=(row_counts(q8_0=3, q4_0=10), row_counts(f16=24)), rows_v=(row_counts(q4_0=5, q2_0=14),) * 2),
    "retain in one tier": replace(CASES["retain in one tier"], rows_k=(row_counts(f32=5), row_counts(q8_0=2, q4_0=8, q2_0=6))),
    "rotated": replace(of_rows(HEADS[64], "mixed"), rotated=True, rope="norm", n_rot=32),
    "heads of 80": of_rows(HEADS[80], "f16"),
    "key MLP": replace(CASES["retain, q4_0 with residuals"], ragged=0.2),
    "key MLP of 24, heads of 128": replace(CASES["retain, q4_0 with residuals"], mlp=24, neighbours=3, d_k=128, d_v=128, n_rot=128, N=40, kept=18, rows_k=(row_counts(q4_0=18), row_counts(q4_0=18, q2_0=22))),
    "query": replace(PCA, tokens=4, group=1),  # 48 vectors
    "query, one": replace(PCA, tokens=1, group=1),
    "query, odd block": replace(PCA, N=24, tokens=3, group=1, terms=(14, 16, 0), rows_k=(row_counts(q8_0=2, q4_0=6, q2_0=10), row_counts(q8_0=24)), ragged=0.4),
    "query, too many": replace(PCA, tokens=8),  # rebuilt
    "query, no rows": replace(PCA, rows_k=(row_counts(q8_0=0), row_counts(q8_0=16))),
    "query, retain and pca": replace(PCA, retain=(True, False), kept=6, neighbours=2, rows_k=(row_counts(q8_0=6), row_counts(q4_0=16))),
    "query, retain": replace(RETAIN, tokens=8, ragged=0.3),
    "retain without MLP": replace(RETAIN, query=False, tokens=3, ragged=0.3),
    "one query": replace(of_rows(HEADS[128], "mixed"), tokens=1, group=1),
    "8 sequences": replace(PCA, tokens=8, group=1, sequences=8, slots=(13, 6), ragged=0.3),
}
F16 = 1e-2  # absolute: keys and values of up to 6 are sums of products of f16 and f16; the largest difference here is 0.008 (key MLP), in attention 0.0015 (8 sequences that see few tokens each)


@pytest.mark.parametrize("name", PRODUCTS)
def test_tensor_cores(lib, name):
    """The same calls in plain C++, against sums of f32 and keys that are rebuilt; the order of the threads does not matter."""
    rng = np.random.default_rng(0)
    s = replace(PRODUCTS[name], parts=(1, 1))
    with graph() as g:
        exact, ours = (nodes(lib, g, Data.of(replace(s, tile_f32=f32, query=s.query and not f32))) for f32 in (True, False))
        for what in ours:
            if what == "k" and all(s.retain) and not s.mlp:
                continue  # no product: gates only
            raw = run(lib, ours[what], 128, mma=True)
            assert raw != run(lib, ours[what], 128)
            for threads in (32, 64, 256):
                assert run(lib, ours[what], threads, rng.permutation(threads), mma=True) == raw
            found, expected = (np.frombuffer(x, np.float32) for x in (raw, run(lib, exact[what], 128)))
            most = F16
            if what == "attention":
                found, expected = (result(x, s.d_v) for x in (found, expected))
                most = EIGHT_BITS if s.query and any(s.retain) else F16 / 5
            assert np.abs(found - expected).max() <= most


def result(parts: np.ndarray, d: int) -> np.ndarray:
    """f32 [rows, d + 2]: sums of values, maximum, sum of weights -> [rows, d]."""
    parts = parts.reshape(-1, d + 2)
    return parts[:, :d] / np.maximum(parts[:, d + 1 :], 1e-30)


def test_the_usual_block_fits(lib):
    """64 tokens with heads of 128: CUDA has 48 KB, Metal 32 KB. The numbers of docs/design/architecture.md."""
    rows = (row_counts(q8_0=4, q4_0=16, q2_0=44),) * 2
    s = replace(BASE, N=64, d_k=128, d_v=128, n_rot=128, heads=1, group=8, tokens=1, slots=(1, 1), rows_k=rows, rows_v=rows, tile_f32=False)
    with graph() as g:
        node = nodes(lib, g, Data.of(s))["attention"]
        assert [round(lib.capsule_run(node, 32, None, limit * 1024, limit * 1024, 0) / 1024) for limit in (48, 32)] == [44, 30]


@pytest.mark.parametrize(("mlp", "kb"), [(0, 42), (16, 45)])
def test_so_do_its_errors(lib, mlp, kb):
    """64 rows in f32: beyond the 32 KB of Metal. Compression itself is not."""
    s = replace(ENCODE_CASES["retain, a usual block"], mlp=mlp)
    with graph() as g:
        encode, errors = Cells.of(s, 0, False).nodes(g)
        assert round(lib.capsule_run(errors, 32, None, DEFAULT, DEFAULT, 0) / 1024) == kb
        assert lib.capsule_run(encode, 32, None, 32 * 1024, 32 * 1024, 0) <= 32 * 1024


def test_real_threads(tmp_path):
    """32 threads and barriers: what a GPU does, and no races. Without one of the barriers the result is wrong."""
    code = native_code.NATIVE / "capsule_threads.cpp"
    built = native_code.build(code, tmp_path / "threads", "-g", "-O1", "-fsanitize=thread")
    done = native_code.run(built, TSAN_OPTIONS="exitcode=66")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert goes_wrong(built, "0")
    assert goes_wrong(built, "9")


def goes_wrong(built: Path, missing: str, tries: int = 5) -> bool:
    """Without that barrier: a wrong result, a report or no end. A race need not show every time."""
    for _ in range(tries):
        try:
            if native_code.run(built, missing, timeout=10).returncode != 0:
                return True
        except subprocess.TimeoutExpired:
            return True
    return False


CUDA_ARCH = "sm_80"


@pytest.mark.parametrize("name", ["capsule.cu", "ggml-cuda.cu"])
def test_the_cuda_code_compiles(tmp_path, name):
    """The kernels, without spilled registers, and the file with the hooks."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    folder = native_code.source() / "ggml" / "src" / "ggml-cuda"
    flags = ["-std=c++17", f"-arch={CUDA_ARCH}", "-extended-lambda", "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128", *native_code.includes(), f"-I{folder}"]
    if not (Path(nvcc).resolve().parents[1] / "include" / "cublas_v2.h").is_file():
        flags.append(f"-I{native_code.NATIVE / 'cublas_stub'}")
    done = native_code.run(nvcc, *flags, "-Xptxas", "-v", "--keep", "--keep-dir", tmp_path, "-c", folder / name, "-o", tmp_path / "out.o")
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "capsule.cu":
        ptx = (tmp_path / "capsule.ptx").read_text()
        assert "wmma.mma" in ptx and "dp4a" in ptx
        spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
        assert "capsule_attn_kernel" in done.stderr and spills and set(spills) == {"0"}


def test_the_metal_source_keeps_to_its_address_spaces(tmp_path):
    """There is no Metal compiler here: clang with the same qualifiers finds pointers of the wrong kind and names that Metal does not have."""
    clang, cmake = shutil.which("clang++"), shutil.which("cmake")
    if not clang or not cmake:
        pytest.skip("no clang++ or cmake: the Metal source is not checked here")
    folder, shim = native_code.source() / "ggml" / "src" / "ggml-metal", native_code.NATIVE / "metal_shim"
    rendered = native_code.run(cmake, f"-DTREE={folder}", f"-DOUT={tmp_path}", "-P", shim / "render.cmake")
    assert rendered.returncode == 0, rendered.stderr
    text = re.fullmatch(r'R"capsule\((.*)\)capsule"', (tmp_path / "ggml-metal-capsule-source.h").read_text(), re.DOTALL)[1]
    text = re.sub(r"\[\[\w+(\(\d+\))?\]\]", "", text)  # [[buffer(0)]] and the like mean nothing to clang
    command = [clang, "-x", "c++", "-std=c++14", "-fsyntax-only", "-Werror", "-ffreestanding", "--target=aarch64-none-elf", "-D__METAL_VERSION__=310", f"-I{shim}"]
    good, bad = tmp_path / "capsule.metal", tmp_path / "wrong.metal"
    good.write_text(text)
    bad.write_text(text.replace("CAPSULE_SHARED const T * x   = tile", "CAPSULE_GLOBAL const T * x   = tile"))
    assert good.read_text() != bad.read_text()
    done = native_code.run(*command, good)
    assert done.returncode == 0, done.stderr[:3000]
    assert native_code.run(*command, bad).returncode != 0


def test_the_metal_host_code_compiles(tmp_path):
    """Pipelines, dispatch and supports_op, and the hook in ggml-metal-ops.cpp; the header also as C, for the Objective-C files."""
    folder = native_code.source() / "ggml" / "src" / "ggml-metal"
    (tmp_path / "ggml-metal-capsule-source.h").write_text('""')
    (tmp_path / "header.c").write_text('#include "ggml-metal-capsule.h"\n')
    flags = ["-fsyntax-only", *native_code.includes(), f"-I{folder}", f"-I{tmp_path}"]
    for name, option in ((folder / "ggml-metal-capsule.cpp", "-DGGML_METAL_CAPSULE"), (folder / "ggml-metal-ops.cpp", "-DGGML_METAL_CAPSULE"), (tmp_path / "header.c", "-UX")):
        done = native_code.run(native_code.compiler(), "-xc" if name.suffix == ".c" else "-std=c++17", option, *flags, name)
        assert done.returncode == 0, done.stderr[:3000]

"""Finding and loading the libraries, each case in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, library
from tiny_archs import FULL, SLIDING
from tiny_gguf import TinyModel

from kvcapsule_gguf.native import CapsuleStats


def python(code: str, lib: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **env, "PYTHONPATH": str(ROOT)} | ({"KVCAPSULE_LIB": str(lib)} if lib else {})
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def error_of(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode != 0
    name, _, text = process.stderr.strip().splitlines()[-1].partition(": ")
    assert name.endswith("NativeError"), process.stderr
    return text


LOAD = "from kvcapsule_gguf import native; n = native.load(); "


def test_load_uses_one_folder_for_all_libraries() -> None:
    lib = library("patched")
    code = "m = native.llama_cpp(); import llama_cpp.mtmd_cpp as t; n.mtmd; print(m._base_path, t._libmtmd_base_path, n.directory, native.load() is n)"
    result = python(LOAD + code, lib)
    assert result.stdout.split() == [str(lib.resolve())] * 3 + ["True"], result.stderr


def test_llama_cpp_python_is_not_needed() -> None:
    """But for its own API."""
    without = "import sys; sys.modules['llama_cpp'] = None; import importlib.metadata as m; m.version = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError()); "
    assert python(without + LOAD + "print(n.mtmd.mtmd_context_params_default().media_marker)", library("patched")).stdout.strip() == "b'<__media__>'"
    assert "pip install \"kvcapsule-gguf[llama-cpp-python]\"" in error_of(python(without + "from kvcapsule_gguf import KVCapsuleLlama", library("patched")))


def test_libraries_that_are_not_there(tmp_path: Path) -> None:
    assert "are not built" in error_of(python(LOAD, tmp_path)) and "run scripts/setup" in error_of(python(LOAD, tmp_path))


def test_a_library_without_mtmd(tmp_path: Path) -> None:
    for path in library("stock").iterdir():
        if path.is_file() and "mtmd" not in path.name:
            shutil.copy(path, tmp_path)
    assert "no libmtmd" in error_of(python(LOAD + "n.mtmd", tmp_path))


def test_a_foreign_llama_cpp_that_came_first() -> None:
    stock = str(library("stock"))
    code = "import llama_cpp.llama_cpp; " + LOAD
    assert "imported before KVCapsule" in error_of(python(code, library("patched"), LLAMA_CPP_LIB_PATH=stock, MTMD_CPP_LIB=stock))


def test_another_folder_afterwards() -> None:
    assert "is loaded from" in error_of(python(LOAD + f"native.load({str(library('stock'))!r})", library("patched")))


def test_another_version_of_llama_cpp_python() -> None:
    code = "import importlib.metadata as m; m.version = lambda name: '0.3.35'; " + LOAD + "native.llama_cpp()"
    assert "0.3.35 is installed, KVCapsule needs exactly 0.3.36" in error_of(python(code, library("patched")))


def test_a_library_of_another_version(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    (tmp_path / "x.c").write_text("int llama_something_else;\n")
    subprocess.run([compiler, "-shared", "-o", tmp_path / "libllama.so", tmp_path / "x.c"], check=True)
    assert "older or newer than this package" in error_of(python(LOAD, tmp_path))


def test_a_library_that_was_not_built_again() -> None:
    missing = "import ctypes; real = ctypes.CDLL.__getitem__; ctypes.CDLL.__getitem__ = lambda lib, name: real(lib, name.replace('capsule_get_stats', 'no_such')); "
    said = error_of(python(missing + LOAD, library("patched")))
    assert "older or newer than this package" in said and "llama_no_such" in said and "run scripts/setup" in said


def test_the_stock_library_has_no_capsules() -> None:
    stock = library("stock")
    assert python(LOAD + "print(n.has_capsule, native.is_attached(None))", stock).stdout.split() == ["False", "False"]
    assert "has no capsules" in error_of(python(LOAD + "native.fingerprint(None)", stock))


def test_derived_sizes() -> None:
    s = CapsuleStats(n_hot=512, n_hot_used=40, n_hot_vision=32, n_cold=96, bytes_slots=3000,
                     bytes_pools=8000, bytes_scratch=500, bytes_hot=51200, bytes_f16_token=100)
    assert (s.vision_tokens, s.kv_bytes_f16, s.kv_bytes, s.bytes_allocated) == (128, 12800, 3000 + 3200, 51200 + 8000 + 500)


# --- with capsules ---------------------------------------------------------------------------------------------------------------------------

WITH_MODEL = LOAD + """
import sys, ctypes
L = n.llama
silent = L.ggml_log_callback(lambda *a: None)
L.llama_log_set(silent, ctypes.c_void_p(0))
model = L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params())
"""


def require_capsules() -> None:
    """Skips while this repository has no patches; a library without capsules afterwards is a failure."""
    lib = library("patched")
    if python(LOAD + "print(n.has_capsule)", lib).stdout.strip() != "True":
        (pytest.fail if any((ROOT / "patches").glob("*.patch")) else pytest.skip)(f"the library in {lib} is not patched")


def with_model(code: str, *arguments: str | Path, capsule: bool = True) -> subprocess.CompletedProcess[str]:
    lib = library("patched")
    if capsule:
        require_capsules()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(lib)}
    return subprocess.run([sys.executable, "-c", WITH_MODEL + code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120)


SHAPES = "print([tuple(shape) for shape in native.layer_shapes(model)])"


@pytest.mark.parametrize("arch", ["llama", "deci", "gemma4", "gemma4-e", "lfm2", "granitehybrid", "qwen35"])
def test_layer_shapes(models, arch) -> None:
    """Head counts that differ between layers, layers without K and V, and those of a sliding window with another head size."""
    model = TinyModel(arch)
    own = model.n_layer - model.kind.keys.get("attention.shared_kv_layers", 0)
    wanted = []
    for i in range(model.n_layer):
        d = model.head_of(i)
        wanted.append((model.kv_heads[i], d, d) if i < own and model.layers[i] in (FULL, SLIDING) else (0, 0, 0))
    result = with_model(SHAPES, models(model))
    assert result.stdout.strip() == str(wanted), result.stderr


def test_layer_shapes_of_a_library_without_capsules(models) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("stock"))}
    result = subprocess.run([sys.executable, "-c", WITH_MODEL + SHAPES, str(models())], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[(2, 64, 64), (2, 64, 64)]", result.stderr


def test_fingerprint_is_that_of_the_format(models) -> None:
    from kvcapsule_gguf.format.fingerprint import fingerprint

    result = with_model("print(native.fingerprint(model))", models())
    assert result.stdout.strip() == fingerprint(models()), result.stderr


def test_a_capsule_of_another_model_is_one_line(models, capsules) -> None:
    result = with_model("""
try:
    native.Capsule.load(model, sys.argv[2])
except native.CapsuleError as error:
    print(error)
""", models(), capsules(models(seed=7)))
    assert result.returncode == 0 and len(result.stdout.strip().splitlines()) == 1, result.stderr


def test_context_stats_and_reading_the_cache(models, capsules) -> None:
    code = """
capsule = native.Capsule.load(model, sys.argv[2])
params = L.llama_context_default_params(); params.n_ctx = 512
ctx = native.init_context(model, params, native.Attachment(capsule, n_hot=256, quality=0.5))
assert native.is_attached(ctx), native.last_error()
tokens = (L.llama_token * 5)(1, 2, 3, 4, 5)
assert L.llama_decode(ctx, L.llama_batch_get_one(tokens, 5)) == 0
k, v = native.read_kv(ctx, 1, native.layer_shapes(model)[1])
s = native.stats(ctx)
print(k.shape, v.shape, bool(abs(k).sum() > 0), s.n_hot, s.n_hot_used, s.n_cold, s.bytes_f16_token)
plain = L.llama_init_from_model(model, params)
print(native.is_attached(plain))
L.llama_free(plain); L.llama_free(ctx); capsule.close(); L.llama_model_free(model)
"""
    result = with_model(code, models(), capsules(models()))
    assert result.stdout.splitlines() == ["(5, 2, 64) (5, 2, 64) True 256 5 0 1024", "False"], result.stderr


def test_a_context_that_only_measures_leaves_the_capsule_of_the_environment_alone(models, capsules) -> None:
    """llama-server and llama-mtmd-cli first make a context on a model without data (no_alloc) to see what fits into memory."""
    require_capsules()
    code = """
del model
params = L.llama_model_default_params(); params.no_alloc = True; params.load_mode = 0
model = L.llama_model_load_from_file(sys.argv[1].encode(), params)
print(bool(L.llama_init_from_model(model, L.llama_context_default_params())))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched")), "LLAMA_KVCAPSULE": str(capsules(models()))}
    result = subprocess.run([sys.executable, "-c", WITH_MODEL + code, str(models())], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "True", result.stderr

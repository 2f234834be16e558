"""Compiling test code against the sources of the patched library."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, library

NATIVE = ROOT / "tests" / "native"


def source() -> Path:
    """llama.cpp's tree that the patched library was built from."""
    tree = Path(os.environ.get("KVCAPSULE_TEST_SOURCE") or next(ROOT.glob(".cache/llama.cpp-*/patched/source"), ROOT))
    if not (tree / "ggml" / "src").is_dir():
        pytest.skip(f"no patched llama.cpp in {tree}: run scripts/setup, or set KVCAPSULE_TEST_SOURCE")
    return tree


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++")
    if not found:
        pytest.skip("needs a C++ compiler")
    return found


def run(*command: object, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})


def tiles(name: str, folder: Path, *flags: str, cxx: str = "", kind: Sequence[str] = ("-shared", "-fPIC")) -> Path:
    """tests/native/<name>.cpp with the plain C++ of ggml-capsule/, as a library (or as `kind` says); it needs nothing of llama.cpp."""
    src, out = ROOT / "patches" / "files" / "ggml" / "src" / "ggml-capsule", folder / f"{name}.so"
    done = run(cxx or compiler(), "-std=c++17", "-O1", *kind, f"-I{src}", *flags, NATIVE / f"{name}.cpp", *sorted(src.glob("*.cpp")), "-o", out)
    assert done.returncode == 0, done.stderr
    return out


def few_bytes(folder: Path) -> dict[str, str]:
    """The environment in which tests/native/few_bytes.cpp counts and limits ggml's buffers."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs LD_PRELOAD and glibc")
    out = folder / "few_bytes.so"
    done = run(compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", NATIVE / "few_bytes.cpp", "-o", out)
    assert done.returncode == 0, done.stderr
    return {"LD_PRELOAD": str(out)}


def shared_library(name: str, folder: Path) -> Path:
    """tests/native/<name>.cpp, which sees the headers of libllama, as a library."""
    out = folder / f"{name}.so"
    flags = [f"-I{source() / inside}" for inside in ("src", "include", "ggml/include")]
    link = [f"-L{library('patched')}", f"-Wl,-rpath,{library('patched')}", "-lllama", "-ldl"]
    done = run(compiler(), "-std=c++17", "-shared", "-fPIC", *flags, NATIVE / f"{name}.cpp", *link, "-o", out)
    assert done.returncode == 0, done.stderr
    return out

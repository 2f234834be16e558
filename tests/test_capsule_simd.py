"""The kernels in the vector units of this machine, and in plain C++, against loops in double: tests/native/capsule_simd.cpp. scripts/check_simd has those of other machines."""

from __future__ import annotations

from pathlib import Path

import native_code
import pytest


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    src = native_code.source() / "src"
    files = [src / "llama-capsule-rows.cpp", *sorted(src.glob("llama-capsule-simd*.cpp"))]
    return native_code.build(native_code.NATIVE / "capsule_simd.cpp", tmp_path_factory.mktemp("simd") / "simd", "-O2", f"-I{src}", *map(str, files))


def test_every_function(program):
    done = native_code.run(program, 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("plain ")

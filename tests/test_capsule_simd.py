"""The kernels in the vector units of this machine, and in plain C++, against loops in double: tests/native/capsule_simd.cpp. scripts/check_simd has those of other machines."""

from __future__ import annotations

from pathlib import Path

import native_code
import pytest


@pytest.fixture(scope="module")
def program(kernels, tmp_path_factory) -> Path:
    return native_code.build(native_code.NATIVE / "capsule_simd.cpp", tmp_path_factory.mktemp("simd") / "simd", "-O1", *kernels)


def test_every_function(program):
    done = native_code.run(program, 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("plain ")

"""The kernels in the vector units of this machine, and in plain C++, against loops in double: tests/native/capsule_simd.cpp. scripts/check_simd has those of other machines."""

from __future__ import annotations

import re
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


def test_the_table_that_is_chosen(program):
    """By the family of the CPU, in every process the same: AVX2 on Zen 4, elsewhere the widest. A name selects another, a wrong one none."""
    tables = list(dict.fromkeys(line.split()[0] for line in native_code.run(program, 1).stdout.splitlines()))[:-1]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    zen4 = "AuthenticAMD" in info and re.search(r"^cpu family\s*: 25$", info, re.M)
    default = "avx2" if zen4 else tables[-1]
    for name, chosen in ({"": default, "0": "plain", "fast": default} | {t: t for t in tables}).items():
        assert native_code.run(program, 1, LLAMA_KVCAPSULE_SIMD=name).stdout.splitlines()[-1] == f"chosen: {chosen}"

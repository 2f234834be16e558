"""The tables that need no file: the library's are numpy's, for heads of every shape."""

from __future__ import annotations

import ctypes as c

import numpy as np
import pytest
from native_code import shared_library

from kvcapsule_gguf.codec.builtin import SMALLER, builtin_bits, builtin_table
from kvcapsule_gguf.codec.channels import key_groups, plain_groups
from kvcapsule_gguf.codec.head import Head


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return c.CDLL(shared_library("builtin_tables", tmp_path_factory.mktemp("native"))).builtin_tables


HEADS = [(d, d, d) for d in (1, 2, 31, 32, 33, 64, 72, 80, 96, 100, 128, 192, 256, 512)]
HEADS += [(128, 128, 64), (64, 96, 32), (256, 128, 64), (80, 80, 20), (96, 64, 0), (576, 512, 64)]


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("d_k, d_v, rotated", HEADS)
def test_as_numpy_has_them(native, d_k, d_v, rotated, rope):
    heads, rotated = 3, rotated - rotated % 2
    groups = key_groups(d_k, "neox" if rope else "none", rotated), plain_groups(d_v)
    expected = [np.stack([np.repeat(builtin_table(builtin_bits(x, kind), len(g))[None], heads, 0) for x in SMALLER]) for kind, g in zip("kv", groups)]
    tables = [np.full_like(x, 99) for x in expected]
    smaller = np.zeros(len(SMALLER), np.float32)
    assert native(heads, d_k, d_v, rope, rotated, *(x.ctypes.data_as(c.c_void_p) for x in (smaller, *tables))) == len(SMALLER)
    for ours, theirs in zip(tables, expected):
        assert np.array_equal(ours, theirs)
    for tier, got in enumerate(smaller):
        size = sum(Head(np.zeros(d), g, t[tier, 0]).size(8, 8) for d, g, t in zip((d_k, d_v), groups, expected))
        assert got == np.float32(128 * (d_k + d_v) / size)

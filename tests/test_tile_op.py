"""GGML_OP_CAPSULE on tiles on the CPU backend against numpy: attention in parts, and what is unpacked into the cells of a cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tile_op import Data, Setting, helper, rotate, run_attention, run_unpack

EXACT = 3e-5  # of values near 1: f32 sums in another order
KERNEL = 1e-2  # integer kernels, relative to the rms
BASE = Setting(ragged=0.2)


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return helper(tmp_path_factory.mktemp("tile"))


@cache
def data_of(s: Setting, lib) -> Data:
    """Not to be changed."""
    return Data(s, lib)


CASES = {
    "neox": BASE,
    "norm": replace(BASE, rope="norm"),
    "norm, part of the head": replace(BASE, rope="norm", n_rot=32),
    "no rope": replace(BASE, rope="none"),
    "m-rope": replace(BASE, rope="mrope", sections=(12, 10, 10, 0)),
    "yarn": replace(BASE, scale=1.2),
    "runs": replace(BASE, grids=((0, 64), (0, 64), (0, 150))),
    "one token": replace(BASE, grids=((1, 1), (0, 3))),
    "ragged grids": replace(BASE, grids=((3, 19), (17, 8), (7, 7), (1, 30))),
    "no axes": replace(BASE, axes=False),
    "no hot cells": replace(BASE, n_kv=0),
    "one hot cell": replace(BASE, n_kv=1),
    "many hot cells": replace(BASE, n_kv=700, cache="f16", mask="f16"),
    "one query": replace(BASE, tokens=1, gqa=1),
    "8 tokens of a group of 7": replace(BASE, tokens=8, gqa=7),
    "64 tokens": replace(BASE, tokens=64, grids=((8, 8), (9, 8))),
    "130 tokens": replace(BASE, tokens=130, sequences=2, grids=((8, 8), (9, 8)), n_kv=130),
    "one KV head of a group of 8": replace(BASE, heads=1, gqa=8, grids=((24, 24),)),
    "16 KV heads": replace(BASE, heads=16, gqa=1, d_k=32, d_v=32, n_rot=32, grids=((8, 8), (8, 5))),
    "three sequences": replace(BASE, tokens=6, sequences=3, grids=((9, 9),) * 4, ragged=0.5),
    "hardly anything visible": replace(BASE, tokens=4, ragged=0.99),
    "nothing visible": replace(BASE, ragged=1.0),
    "f16 cache": replace(BASE, cache="f16", mask="f16"),
    "q8_0 cache": replace(BASE, cache="q8_0"),
    "q4_0 cache": replace(BASE, cache="q4_0"),
    "rotated q8_0 cache": replace(BASE, cache="q8_0", rotated=True, mask="f16"),
    "transposed V": replace(BASE, v_trans=True, cache="f16", n_kv=700),
    "transposed V, f32": replace(BASE, v_trans=True),
    **{f"head size {d}": replace(BASE, d_k=d, d_v=d, n_rot=d, heads=1 + (d < 128), grids=((9, 8),)) for d in (32, 72, 80, 96, 100, 128, 256, 512)},
    "K and V of unlike sizes": replace(BASE, d_k=96, d_v=64, n_rot=32),
    "learned": replace(BASE, codec="learned"),
    "retain": replace(BASE, codec="retain"),
    "retain with MLP": replace(BASE, codec="retain", mlp=5, rope="norm"),
    "retain, m-rope": replace(BASE, codec="retain", rope="mrope", sections=(12, 10, 10, 0), axes=False),
    "retain, no rope": replace(BASE, codec="retain", mlp=2, rope="none", grids=((16, 16), (0, 70))),
    "retain, yarn": replace(BASE, codec="retain", scale=1.2, ragged=0.6),
    "retain, part of the head": replace(BASE, codec="retain", mlp=2, d_k=100, d_v=80, n_rot=36, tokens=1, gqa=3),
    "learned, rotated q8_0 cache": replace(BASE, codec="learned", cache="q8_0", rotated=True, mask="f16", tokens=70, sequences=2),
    "learned, no axes": replace(BASE, codec="learned", axes=False, d_k=80, d_v=96, n_rot=80),
    "retain, hardly anything visible": replace(BASE, codec="retain", tokens=4, ragged=0.99),
}


def scale(s: Setting) -> float:
    """Hot cells in few bits meet queries in few bits."""
    return {"q8_0": 0.01, "q4_0": 0.06, "f16": 2e-3}.get(s.cache, KERNEL)


@pytest.mark.parametrize("name", CASES)
def test_attention(lib, name):
    s = CASES[name]
    data = data_of(s, lib)
    want = data.attention()
    got = run_attention(data)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= max(KERNEL, scale(s)) * 4 * max(np.sqrt(np.square(want).mean()), 1e-3)
    # parts are by the shapes alone
    assert (run_attention(data, threads=3) == got).all()


@pytest.mark.parametrize("name", ["neox", "norm", "m-rope", "yarn", "ragged grids", "no axes", "three sequences", "head size 100", "learned", "retain", "retain with MLP"])
def test_plain_attention_is_exact(lib, name):
    """With an f32 cache only the order of the sums differs; integer kernels are for blocks of few bits, and allowed more."""
    data = Data(replace(CASES[name], exact=True), lib)
    want = data.attention()
    assert np.abs(run_attention(data) - want).max() <= KERNEL * np.sqrt(np.square(want).mean())


def test_tokens_that_see_nothing_get_zeros(lib):
    data = Data(replace(BASE, tokens=3), lib)
    data.visible[1], data.seen[1] = False, 0
    got = run_attention(data)
    assert (got[1] == 0).all() and (got[0] != 0).all()


def test_what_nobody_sees_does_not_matter(lib):
    """Cells that are masked for all tokens may hold anything, NaN too: a slot that was given back, or a cell that was never written."""
    data = Data(replace(BASE, cache="f32", n_kv=40, sequences=2, tokens=1), lib)
    data.visible[:, 7] = False
    want = run_attention(data)
    data.hot_k[7] = data.hot_v[7] = np.nan
    assert (run_attention(data) == want).all()


def test_a_cell_that_is_not_a_number_is_not_hidden(lib):
    data = Data(BASE, lib)
    data.visible[:, 7] = True
    data.hot_k[7, 0, 0] = np.nan
    assert np.isnan(run_attention(data)).any()


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].tokens <= 2 and CASES[n].n_kv == 40])
@pytest.mark.parametrize("is_v", [False, True], ids=["K", "V"])
def test_unpack(lib, name, is_v):
    s = CASES[name]
    data = data_of(s, lib)
    want = data.values if is_v else data.keys
    if s.rotated:
        want = rotate(want, 64 if is_v else None)
    got = run_unpack(data, is_v=is_v).reshape(want.shape)
    width = {"f32": 1e-5, "f16": 1e-3, "q8_0": 0.02, "q4_0": 0.3}[s.cache]
    assert np.abs(got - want).max() <= width * max(np.abs(want).max(), 1)
    assert (run_unpack(data, is_v=is_v, threads=3, copy=True).reshape(want.shape) == got).all()


def test_unpack_of_tokens_at_any_positions(lib):
    data = Data(replace(BASE, bent=True), lib)
    assert np.abs(run_unpack(data, is_v=False).reshape(data.keys.shape) - data.keys).max() <= 1e-5 * np.abs(data.keys).max()

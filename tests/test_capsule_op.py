"""GGML_OP_CAPSULE on the CPU backend, which runs the very phases of the GPU kernels, against numpy."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from capsule_op import Data, Setting, ggml, params, rotate, row_types, run_attention, run_unpack

from kvcapsule_gguf.codec.types import row_counts

EXACT = 2e-5  # of values near 1: f32 sums in another order
HALF = 1e-2  # tiles of f16: absolute, of values up to about 6
BASE = Setting(ragged=0.2)

RETAIN = replace(BASE, retain=(True, True), kept=5, neighbours=4, mlp=8, rows_k=(row_counts(f32=5), row_counts(f32=16)))
HEADS = {
    64: BASE,
    80: replace(BASE, d_k=80, d_v=80, n_rot=80),
    128: replace(BASE, d_k=128, d_v=128, n_rot=128),
    "part": replace(BASE, d_k=96, d_v=64, n_rot=32),
    "256": replace(BASE, d_k=256, d_v=256, n_rot=256, N=24, heads=1),
}
ROWS = [(head, name) for head, s in HEADS.items() for name in row_types(min(s.d_k, s.d_v), s.N) if s.d_k % 64 == 0 or (name in ("f32", "f16", "mixed", "q8_0") and s.d_k == s.d_v)]


def of_rows(s: Setting, name: str) -> Setting:
    """Economy with these rows, faithful with all rows in f32 or (if that is what the economy tier has) f16."""
    rows_k, rows_v = (row_types(d, s.N)[name] for d in (s.d_k, s.d_v))
    other = row_counts(f16=s.N) if name == "f32" else row_counts(f32=s.N)
    return replace(s, rows_k=(rows_k, other), rows_v=(rows_v, other))


@pytest.mark.parametrize(("head", "rows"), ROWS)
def test_every_row_type(head, rows):
    compare(of_rows(HEADS[head], rows))


CASES = {
    "norm": replace(BASE, rope="norm"),
    "norm, part of the head": replace(BASE, rope="norm", n_rot=32),
    "no rope": replace(BASE, n_rot=0),
    "one tier": replace(BASE, slots=(4, 0)),
    "the other tier": replace(BASE, slots=(0, 4)),
    "no hot cells": replace(BASE, n_kv=0),
    "one hot cell": replace(BASE, n_kv=1),
    "one query": replace(BASE, tokens=1, group=1),
    "8 tokens of a group of 7": replace(BASE, tokens=8, group=7),
    "more parts than slots": replace(BASE, parts=(6, 9)),
    "one part": replace(BASE, parts=(1, 1)),
    "three sequences": replace(BASE, tokens=6, sequences=3, slots=(7, 4), ragged=0.5),
    "8 sequences": replace(BASE, tokens=8, group=1, sequences=8, slots=(13, 6), parts=(2, 3)),
    "8 sequences, groups of 3": replace(BASE, tokens=8, group=3, sequences=8, slots=(13, 6), parts=(2, 3), ragged=0.3),
    "32 sequences": replace(BASE, tokens=32, group=1, sequences=32, slots=(40, 9), parts=(1, 3), n_kv=64),
    "hardly anything visible": replace(BASE, tokens=4, ragged=0.995, slots=(9, 9)),
    "f16 cache, f16 mask": replace(BASE, cache="f16", mask="f16"),
    "q8_0 cache": replace(BASE, cache="q8_0"),
    "q4_0 cache": replace(BASE, cache="q4_0"),
    "rotated q8_0 cache": replace(BASE, cache="q8_0", rotated=True),
    "transposed V": replace(BASE, v_trans=True, cache="f16"),
    "odd block": replace(BASE, N=13, rows_k=(row_counts(f32=13),) * 2, rows_v=(row_counts(f32=9),) * 2),
    "retain": RETAIN,
    "retain without MLP": replace(RETAIN, mlp=0),
    "retain, norm": replace(RETAIN, rope="norm"),
    "retain, q4_0 with residuals": replace(RETAIN, rows_k=(row_counts(q4_0=5), row_counts(q4_0=5, q2_0=11))),
    "retain in one tier": replace(RETAIN, retain=(True, False)),
    "retain, every token kept": replace(RETAIN, kept=16, mlp=0, rows_k=(row_counts(f32=16),) * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_geometries(name):
    compare(CASES[name])


def compare(s: Setting) -> None:
    """Attention and unpacked columns, with tiles of f32 and of f16."""
    data = Data.of(s)
    attention = data.attention()
    keys, values = data.cold_keys(), data.cold_values()
    assert np.abs(run_attention(data) - attention).max() <= EXACT
    if s.cache == "f32":
        assert np.abs(run_unpack(data, is_v=False) - flat(keys)).max() <= EXACT * 4
        assert np.abs(run_unpack(data, is_v=True) - flat(values)).max() <= EXACT * 4
    data.s = replace(s, tile_f32=False)
    assert np.abs(run_attention(data) - attention).max() <= HALF
    if s.cache == "f32":
        assert np.abs(run_unpack(data, is_v=False) - flat(keys)).max() <= HALF


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@pytest.mark.parametrize(("cache", "rotated"), [("f16", False), ("q8_0", False), ("q8_0", True), ("q4_0", True)])
def test_unpack_writes_what_the_cache_would_hold(cache, rotated):
    """Within one step of a quantized value: sums of f32 in another order may tip a rounding."""
    data = Data.of(replace(BASE, cache=cache, rotated=rotated))
    for is_v, x, n in ((False, data.cold_keys(), None), (True, data.cold_values(), 64)):
        expected = flat(rotate(x, n) if rotated else x)
        found = run_unpack(data, is_v=is_v)
        step = {"f16": 4e-3, "q8_0": np.abs(expected).max() / 127, "q4_0": np.abs(expected).max() / 8}[cache]
        assert np.abs(found - expected).max() <= step
    if not rotated:
        assert (np.abs(found - flat(data.as_cached(x))) > 1e-6).mean() < 0.01


def test_transposed_values():
    data = Data.of(replace(BASE, v_trans=True, cache="f16"))
    assert np.abs(run_unpack(data, is_v=True) - flat(data.cold_values())).max() <= 4e-3


def test_the_threads_of_the_cpu_do_not_matter():
    data = Data.of(replace(BASE, tokens=3, slots=(5, 4), parts=(3, 5)))
    assert (run_attention(data) == run_attention(data, threads=3)).all()
    assert (run_unpack(data, is_v=False) == run_unpack(data, is_v=False, threads=3)).all()


@pytest.mark.parametrize("seed", range(12))
def test_random_geometries(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.choice([64, 80, 128]))
    N = int(rng.integers(8, 40))
    kinds = row_types(d, N)
    pick = lambda: kinds[str(rng.choice(list(kinds)))]  # noqa: E731
    s = Setting(rows_k=(pick(), pick()), rows_v=(pick(), pick()), slots=(int(rng.integers(0, 5)), int(rng.integers(1, 5))), N=N, heads=int(rng.integers(1, 4)),
                group=int(rng.integers(1, 5)), d_k=d, d_v=d, n_rot=int(rng.choice([0, 32, d])), rope=str(rng.choice(["norm", "neox"])), tokens=int(rng.integers(1, 9)),
                n_kv=int(rng.integers(0, 100)), cache=str(rng.choice(["f32", "f16"])), mask=str(rng.choice(["f32", "f16"])),
                parts=(int(rng.integers(1, 5)), int(rng.integers(1, 5))), sequences=int(rng.integers(1, 4)), ragged=float(rng.random()), seed=seed)  # fmt: skip
    compare(s)


@pytest.mark.parametrize(
    "wrong",
    [{"N": 200}, {"d_k": 65}, {"n_rot": 128}, {"rows_k": (row_counts(f32=17),) * 2}, {"rows_v": (row_counts(q2_0=8),) * 2, "d_v": 96}, {"retain": (True, False)}],
    ids=str,
)
def test_geometries_that_the_op_does_not_have(wrong):
    assert ggml().ggml_capsule_valid(ctypes.byref(params(BASE)))
    assert not ggml().ggml_capsule_valid(ctypes.byref(params(replace(BASE, **wrong))))


@pytest.mark.parametrize("s", [BASE, RETAIN, CASES["retain, q4_0 with residuals"], CASES["odd block"]], ids=["pca", "retain", "mixed", "odd"])
def test_slots_are_as_large_as_the_numpy_ones(s):
    data = Data.of(s)
    for tier in range(2):
        assert ggml().ggml_capsule_slot_size(ctypes.byref(params(s)), tier) == data.slots[tier].shape[1]

"""The searched scale: the fast rule against the rule spelled out, and against a dense search for the best scale there is."""

from __future__ import annotations

import numpy as np
import pytest

from kvcapsule_gguf.codec.scale import BITS, MOST, ONE, SMALLEST, STARTS, search

KINDS = ("normal", "laplace", "student", "sparse", "one", "tiny", "huge", "zero", "edge")


def blocks(kind: str, n: int, values: int = 64) -> np.ndarray:
    rng = np.random.default_rng([n, values, KINDS.index(kind)])
    x = rng.standard_normal((n, values))
    if kind == "laplace":
        x = rng.laplace(size=(n, values))
    elif kind == "student":
        x = rng.standard_t(4, (n, values))
    elif kind == "sparse":
        x *= rng.random((n, values)) < 0.1
    elif kind == "one":
        x *= np.arange(values) == rng.integers(0, values, (n, 1))
    elif kind == "tiny":
        x *= 2.0 ** rng.integers(-30, -16, (n, 1))
    elif kind == "huge":
        x *= 1e6
    elif kind == "zero":
        x *= 0
    elif kind == "edge":  # many equal values: ties of codes and of candidates
        x = rng.integers(-3, 4, (n, values)) / 4
    return x.astype(np.float32)


def spelled_out(x: np.ndarray, bits: int) -> tuple[np.float32, list[int]]:
    """The rule of codec/scale.py for one block, in Python's own integers."""
    amax = np.abs(x).max()
    if not amax >= SMALLEST:
        return np.float32(0), [-1 if bits == 1 else 0] * len(x)
    y = [int(v) for v in np.rint(x * (ONE / amax))]
    if bits == 1:
        kept = [1 if v >= 0 else -1 for v in y], 1, sum(map(abs, y)), len(y)
    else:
        kept, best = ([0] * len(y), 1, 0, 1), 0
        low, high, shift = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 30 - bits

        def attempt(sign: int, steps: int) -> None:
            nonlocal kept, best
            c = [min(max((sign * v * steps + 2 ** (shift - 1)) >> shift, low), high) for v in y]
            xc, cc = sum(sign * v * k for v, k in zip(y, c)), sum(k * k for k in c)
            if xc > 0 and xc * xc // cc > best:
                kept, best = (c, sign, xc, cc), xc * xc // cc

        for sign in (1, -1):
            for start in STARTS[bits]:
                attempt(sign, start * 2 ** (10 - bits))
        for _ in range(2):
            if best:
                attempt(kept[1], min((kept[3] << shift) // kept[2], MOST))
    codes, sign, xc, cc = kept
    d = np.float32(sign) * (np.float32(xc) / np.float32(cc)) * (amax / ONE)
    return np.float32(np.float16(np.clip(d, -65504, 65504))), codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_rule_is_the_rule(bits, kind):
    for values in (64, 32, 12):
        x = blocks(kind, 12, values)
        scales, codes = search(x, bits)
        for block, d, c in zip(x, scales, codes):
            want, wanted = spelled_out(block, bits)
            assert d == want and c.tolist() == wanted


def dense(x: np.ndarray, bits: int) -> np.ndarray:
    """f64 [n]: the squared error with the best of many scales of either sign, each with the codes nearest to it."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = x.astype(np.float64)
    best = np.square(x).sum(1)
    for t in np.geomspace(0.4, 1.7, 300) * 2 ** (bits - 1):
        step = np.abs(x).max(1, keepdims=True) / t
        for sign in (1, -1):
            c = np.clip(np.rint(sign * x / step), low, high)
            xc, cc = (sign * x * c).sum(1), np.maximum((c * c).sum(1), 1e-30)
            best = np.minimum(best, np.square(x).sum(1) - np.maximum(xc, 0) ** 2 / cc)
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_near_the_best_scale_there_is(bits, kind):
    x = blocks(kind, 400)
    scales, codes = search(x, bits)
    error = np.square(x - scales[:, None] * codes).sum(1, dtype=np.float64)
    best = dense(x, bits)
    size = np.square(x).sum(1)
    assert (error / size).mean() < 1.04 * (best / size).mean()
    assert np.quantile(error / best, 0.99) < 1.5


def test_errors_fall_with_the_bits():
    """Relative squared errors of normal values, as docs/reference/format-v2.md states them. Theory for one value and the best scale: 0.363, 0.119, 0.037, 0.012."""
    x = blocks("normal", 2000)
    found = {}
    for bits in BITS:
        scales, codes = search(x, bits)
        found[bits] = float(np.square(x - scales[:, None] * codes).mean() / np.square(x).mean())
    assert {b: round(e, 4) for b, e in found.items()} == pytest.approx({1: 0.3574, 2: 0.1233, 3: 0.0315, 4: 0.0081, 6: 0.0005, 8: 0.0}, abs=0.0006)


def test_scales_are_finite_f16_numbers():
    for kind in KINDS:
        for bits in BITS:
            scales, codes = search(blocks(kind, 50), bits)
            assert np.isfinite(scales).all() and (scales == scales.astype(np.float16)).all()
            assert np.abs(codes).max() <= max(1, 2 ** (bits - 1))

"""Codes of 1, 2, 3, 4, 6 or 8 bits with one searched scale for a block: one rule in integers, so that numpy, C++ and a GPU find the same codes and scale.

A value is d * c, with a signed f16 scale d and a code c of b bits: -2^(b-1) ... 2^(b-1) - 1, and -1 or +1 if b = 1. For a block x of n values:

    amax = max |x_j|; if not 2^-20 <= amax < infinity: d = 0 and all codes 0 (1 bit: -1); done
    y_j  = rint(x_j * (32767 / amax))                            f32, an IEEE division, halves to even; then int32
    for sign in (+1, -1), for t in STARTS[b]: try(sign, t << (10 - b))                    t: the code that amax would have, in 1/32
    twice, if there is a best: try(its sign, min((cc << (30 - b)) // xc, 61439))           its codes' own best scale; int64
    try(sign, T):                                                                         T: codes per step of y, times 2^(30 - b)
        c_j = clamp((sign * y_j * T + 2^(29 - b)) >> (30 - b))
        xc  = sum sign * y_j * c_j;  cc = sum c_j^2
        gain = xc * xc // cc                                                              int64; the squared error that these codes take away
        if xc > 0 and gain > the best gain (first 0): this is the best; keep c, sign, xc, cc
    d = f16(sign * (f32(xc) / f32(cc)) * (amax / 32767))         of the best; magnitude at most 65504

With 1 bit c_j is the sign of y_j (0 counts as +1), and there is nothing to search. The first of two equal candidates stays.
"""

from __future__ import annotations

import numpy as np

BITS = (1, 2, 3, 4, 6, 8)
SMALLEST = np.float32(2.0**-20)
LARGEST = np.float32(65504)
ONE = np.float32(32767)
MOST = 61439  # keeps y * T below 2^31
# In 1/32 codes: spread so that more of them gain less than 2 % on Gaussian, Laplacian and t-distributed blocks (tests/test_codec_scale.py).
STARTS = {
    2: (32, 46, 67, 96),
    3: (96, 115, 139, 166),
    4: (218, 238, 258, 282),
    6: (922, 961, 1002, 1044),
    8: (4080,),
}
_CHUNK = 2048  # blocks at once: the temporaries stay in the cache


def search(blocks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """f32 [n, values] -> (f32 [n] scales that are f16 numbers, int8 or int16 [n, values] codes)."""
    x = np.ascontiguousarray(blocks, dtype=np.float32)
    scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int16)
    for i in range(0, len(x), _CHUNK):
        scales[i : i + _CHUNK], codes[i : i + _CHUNK] = _search(x[i : i + _CHUNK], bits)
    return scales, codes


def _search(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    amax = np.abs(x).max(1)
    usable = (amax >= SMALLEST) & (amax < np.inf)
    safe = np.where(usable, amax, np.float32(1))
    y = np.rint(x * (ONE / safe)[:, None]).astype(np.int32)
    if bits == 1:
        best = np.where(y >= 0, 1, -1).astype(np.int16)
        xc, cc, sign = np.abs(y).sum(1, dtype=np.int64), np.full(len(x), x.shape[1], np.int64), np.ones(len(x), np.float32)
    else:
        best, xc, cc, sign = _candidates(y, bits)
    best[~usable] = -1 if bits == 1 else 0
    scale = sign * (xc.astype(np.float32) / cc.astype(np.float32)) * (safe / ONE)
    scale = np.where(usable, np.clip(scale, -LARGEST, LARGEST), np.float32(0))
    return scale.astype(np.float16).astype(np.float32), best


def _candidates(y: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """int32 [n, values] -> codes int16 [n, values], xc and cc int64 [n], sign f32 [n]."""
    n, shift = len(y), 30 - bits
    low, high, half = -(1 << bits - 1), (1 << bits - 1) - 1, np.int32(1 << shift - 1)
    codes = np.zeros(y.shape, np.int16)
    best, best_xc, best_cc, best_sign = np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, np.int64), np.ones(n, np.int32)

    def attempt(z: np.ndarray, steps: np.ndarray | np.int32, sign: np.ndarray | int) -> None:
        c = z * steps
        c += half
        c >>= shift
        np.clip(c, low, high, out=c)
        xc, cc = np.einsum("nj,nj->n", z, c).astype(np.int64), np.einsum("nj,nj->n", c, c).astype(np.int64)
        gain = np.where(xc > 0, xc * xc // np.maximum(cc, 1), 0)
        better = gain > best
        codes[better] = c[better]
        for kept, new in ((best, gain), (best_xc, xc), (best_cc, cc), (best_sign, sign)):
            np.copyto(kept, new, where=better)

    for sign in (1, -1):
        z = y if sign == 1 else -y
        for start in STARTS[bits]:
            attempt(z, np.int32(start << 10 - bits), sign)
    for _ in range(2):
        steps = np.minimum((best_cc << shift) // np.maximum(best_xc, 1), MOST).astype(np.int32)
        attempt(y * best_sign[:, None], steps[:, None], best_sign.copy())
    return codes, best_xc, best_cc, best_sign.astype(np.float32)

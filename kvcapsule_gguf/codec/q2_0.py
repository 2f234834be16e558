"""The q2_0 quantizer: one rule in integers, so that numpy, C++ and CUDA give the same bytes.

ggml's own quantize_row_q2_0_ref never writes the code +2 (relative MSE 0.516 on Gaussian rows); a searched, signed scale does (0.123).

A block of 64 values is an f16 scale `d`, which may be negative, and 64 codes c in {-1, 0, 1, 2}, stored as c + 1 in 2 bits: value j is
(c_j) * d, in bits 2 * (j % 4) of byte j / 4. Encoding a block x, all of it in f32 and int32 (int64 where said):

    amax = max |x_j|;  if not amax >= 2^-20: d = 0, all codes 0, done
    s    = 32768 / amax                                      (IEEE division)
    y_j  = rint(x_j * s)                                     (int32, halves to even)
    for F in (10, 12, 15, 18, 23, 32), for sign in (+1, -1):
        num, den = 1024 * F, 1                               (the scale num / den)
        twice:
            z_j = sign * y_j
            c_j =  2  if 2 * den * z_j >= 3 * num
                   1  if 2 * den * z_j >=     num
                  -1  if 2 * den * z_j <     -num
                   0  otherwise
            xc = sum z_j * c_j;  cc = sum c_j * c_j
            if cc = 0: next sign
            if xc^2 * best_cc > best_xc^2 * cc (int64; best starts at 0 / 1): this is the best, keep c, sign, xc, cc
            num, den = xc, cc                                (the second time: codes for the best scale of the first)
    d = f16(sign * ((f32(xc) / f32(cc)) * (amax * 2^-15)))   (of the best; magnitude at most 65504)

xc^2 / cc is the squared error that a candidate removes. All sums stay below 2^24, so any order, SIMD width or FMA gives the same result;
a GPU needs an IEEE division (`__fdiv_rn`) and `__float2int_rn`. Ties keep the first candidate.
"""

from __future__ import annotations

import numpy as np

BLOCK = 64
FACTORS = (10, 12, 15, 18, 23, 32)
SMALLEST = np.float32(2.0**-20)
_CHUNK = 1024  # blocks at once: the temporaries stay in the cache


def encode_q2_0(x: np.ndarray) -> np.ndarray:
    """f32 [n, d] -> uint8 [n, d / 64 * 18]."""
    blocks = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, BLOCK)
    out = np.empty((len(blocks), 18), dtype=np.uint8)
    for i in range(0, len(blocks), _CHUNK):
        scale, codes = search(blocks[i : i + _CHUNK])
        out[i : i + _CHUNK, :2] = scale.astype("<f2")[:, None].view(np.uint8)
        stored = (codes + 1).astype(np.uint8).reshape(-1, 16, 4)
        out[i : i + _CHUNK, 2:] = stored[:, :, 0] | stored[:, :, 1] << 2 | stored[:, :, 2] << 4 | stored[:, :, 3] << 6
    return out.reshape(len(x), -1)


def decode_q2_0(data: np.ndarray, d: int) -> np.ndarray:
    """uint8 [n, d / 64 * 18] -> f32 [n, d]."""
    blocks = np.ascontiguousarray(data).reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3).reshape(-1, BLOCK).astype(np.float32) - 1
    return (codes * scale).reshape(-1, d)


def search(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [n, 64] -> (f32 [n] scales that are f16 numbers, int32 [n, 64] codes)."""
    amax = np.abs(blocks).max(1)
    usable = amax >= SMALLEST
    safe = np.where(usable, amax, np.float32(1))
    y = np.rint(blocks * (np.float32(32768) / safe)[:, None])
    y = np.where(usable[:, None], y, 0).astype(np.int32)

    n = len(blocks)
    codes = np.zeros((n, BLOCK), dtype=np.int32)
    best_xc = np.zeros(n, dtype=np.int64)
    best_cc = np.ones(n, dtype=np.int64)
    best_sign = np.ones(n, dtype=np.float32)
    for factor in FACTORS:
        for sign in (1, -1):
            z = sign * y
            num = np.full(n, 1024 * factor, dtype=np.int32)
            den = np.ones(n, dtype=np.int32)
            for _ in range(2):
                c = _assign(z, num, den)
                xc = (z * c).sum(1, dtype=np.int64)
                cc = (c * c).sum(1, dtype=np.int64)
                better = xc * xc * best_cc > best_xc * best_xc * cc
                codes[better] = c[better]
                best_xc = np.where(better, xc, best_xc)
                best_cc = np.where(better, cc, best_cc)
                best_sign[better] = sign
                # cc = 0: all codes are 0; any positive scale gives a candidate that is not better, as if it had been skipped
                num = np.where(cc > 0, xc, 1 << 20).astype(np.int32)
                den = np.maximum(cc, 1).astype(np.int32)

    scale = best_xc.astype(np.float32) / best_cc.astype(np.float32) * (safe * np.float32(2.0**-15))
    scale = best_sign * np.minimum(scale, np.float32(65504))
    return scale.astype(np.float16).astype(np.float32), codes


def _assign(z: np.ndarray, num: np.ndarray, den: np.ndarray) -> np.ndarray:
    """The nearest codes of z [n, 64] for the scales num / den [n]."""
    twice = z * (2 * den)[:, None]
    num = num[:, None]
    return (twice >= num).astype(np.int32) + (twice >= 3 * num) - (twice < -num)

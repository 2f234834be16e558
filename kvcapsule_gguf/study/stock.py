"""llama.cpp's own types of cache, on all cells or on those of the picture alone: K with RoPE and V, rotated by a Hadamard matrix, quantized row by row."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from ..codec.hadamard import hadamard
from .decoder import Cells

BITS = {"q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "iq4_nl": 4.5}
CODES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)  # of iq4_nl


def cells(keys: str, values: str, everywhere: bool) -> Cells:
    def store(k: torch.Tensor, v: torch.Tensor, picture: slice) -> tuple[torch.Tensor, torch.Tensor]:
        at = slice(None) if everywhere else picture
        out = k.clone(), v.clone()
        for x, name in zip(out, (keys, values)):
            x[at] = torch.from_numpy(hadamard(_round_trip(hadamard(x[at].numpy()), name)))
        return out

    return store


def _round_trip(x: np.ndarray, name: str) -> np.ndarray:
    """f32 [..., d], d a multiple of 32."""
    if name == "iq4_nl":
        return _iq4_nl(x.reshape(-1, 32)).reshape(x.shape)
    kind = gguf.GGMLQuantizationType[name.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    """f32 [n, 32], as ggml's quantize_row_iq4_nl_ref: the codes for a scale by the largest value, then the best scale for these codes, weighed by x^2."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    scaled = x / np.where(largest, largest / CODES[0], 1)
    codes = CODES[np.searchsorted((CODES[1:] + CODES[:-1]) / 2, scaled)]
    weight = np.square(x)
    scale = (weight * codes * x).sum(1, keepdims=True) / np.maximum((weight * codes * codes).sum(1, keepdims=True), 1e-30)
    return scale.astype(np.float16).astype(np.float32) * codes

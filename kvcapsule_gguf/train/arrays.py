"""Fits a capsule to keys and values that were computed elsewhere, for instance in PyTorch (docs/reference/converters.md has an example)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..format.base_model import BaseModel, read_base_model
from ..format.tile_capsule import TileCapsule
from .fit_tiles import fit_tile_capsule
from .source import KVSample, TrainError


def fit_capsule(model: str | Path, samples: Sequence[KVSample], *, transformers_layout: bool = False) -> TileCapsule:
    """A capsule for the GGUF `model`, from one KVSample for every picture (4 have most of the gain).

    A sample has, for each layer with KV heads, keys f32 [tokens, KV heads, key length] *without RoPE* and values f32 [tokens, KV heads, value length], and the width of
    the picture in tokens.
    transformers_layout: keys have the channels in the order of Hugging Face transformers; llama.cpp's order differs where the two of a rotated pair are neighbours
    (architecture `llama`), and is put right here.
    Write the result with format.tile_capsule.write_tile_capsule. Raises TrainError, CapsuleError.
    """
    base = read_base_model(model)
    checked = []
    for i, sample in enumerate(samples):
        _check(base, i, sample)
        if transformers_layout and base.rope_type == "norm":
            sample = replace(sample, keys=[interleave(x, min(base.rope_dimensions, x.shape[-1])) for x in sample.keys])
        checked.append(sample)
    capsule = fit_tile_capsule(base, checked)
    capsule.provenance["images_from"] = "arrays"
    return capsule


def interleave(x: np.ndarray, n: int) -> np.ndarray:
    """Channels [..., d] of which i and i + n/2 are a rotated pair -> 2i and 2i + 1 are one."""
    out = np.array(x)
    out[..., 0:n:2], out[..., 1:n:2] = x[..., : n // 2], x[..., n // 2 : n]
    return out


def _check(base: BaseModel, number: int, sample: KVSample) -> None:
    layers = base.kv_layers
    for what, arrays, length in (("keys", sample.keys, base.key_length), ("values", sample.values, base.value_length)):
        if len(arrays) != len(layers):
            raise TrainError(f"sample {number} has {what} of {len(arrays)} layers, {base.name} has {len(layers)} with KV heads")
        for x, layer in zip(arrays, layers):
            wanted = (base.head_count_kv[layer], length[layer])
            if x.ndim != 3 or x.shape[1:] != wanted:
                raise TrainError(f"sample {number}, layer {layer}: {what} have the shape {list(x.shape)}, not [tokens, {wanted[0]}, {wanted[1]}]")
            if len(x) != len(sample.keys[0]):
                raise TrainError(f"sample {number}, layer {layer}: {len(x)} {what}, not {len(sample.keys[0])} as the keys of the first layer")
            if not np.isfinite(x).all():
                raise TrainError(f"sample {number}, layer {layer} has {what} that are not finite")

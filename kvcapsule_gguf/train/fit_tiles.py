"""Fits a capsule of format v2: means, axes of values, transforms, tables for every tier. Seconds for a few pictures; four have most of the gain.

`train.smaller` and `train.builtin_smaller` say what a picture becomes at the default quality, coded in axes of the other pictures, and without a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..codec.head import F16
from ..format.base_model import BaseModel, licence_of
from ..format.fingerprint import base_of
from ..format.tile_capsule import TileCapsule, TileLayer
from .coded import SIDE, fit_basis
from .cross import axes_for, cross_coded, sizes
from .fit_transform import RetainOptions
from .source import KVSample, TrainError
from .tables import fit_tables

TYPES = (0, 1, 2, 3, 4, 6, 8, F16)
SMALLER = (10, 8, 6.5, 6, 5.5, 4.75, 4, 3.25, 2.5, 1.95)  # of the tiers
CODECS = ("dct", "learned", "retain")
LAYERS = ("measured", "pyramid")
SLOPE = 0.3  # of the pyramid
BY_QUALITY = 2  # the first tier that a quality may take; smaller ones are for those who ask for a ratio


def layer_shares(n: int) -> list[float]:
    """The paper's pyramid: the bytes of a layer fall linearly from 1 + SLOPE to 1 - SLOPE times the mean."""
    return [1 + SLOPE * float(x) for x in np.linspace(1, -1, n)] if n > 1 else [1.0]


def fit_tile_capsule(model: BaseModel, samples: Sequence[KVSample], codec: str = "dct", retain: RetainOptions = RetainOptions(), layers: str = "measured") -> TileCapsule:
    """From one sample a picture; whole tiles only are learned from. codec: one of CODECS; layers: where bytes go, one of LAYERS. Raises TrainError."""
    samples = [s for s in samples if s.width >= SIDE and len(s.keys[0]) // s.width >= SIDE]
    if not samples:
        raise TrainError("no picture has a tile of 8 x 8 tokens to learn from")
    options: dict[str, dict[str, Any]] = {"dct": {}, "learned": {"learned": "kv"}, "retain": {"learned": "v", "retain": retain}}
    transforms = options[codec]
    basis = fit_basis(samples, model, v_axes=axes_for(samples), **transforms)
    coded = cross_coded(model, samples, TYPES, transforms)
    pyramid = layers == "pyramid"
    tiers = fit_tables(coded, [16 / x for x in SMALLER], per_layer=pyramid, shares=layer_shares(len(model.kv_layers)) if pyramid else None)
    smaller, builtin = sizes(coded, tiers[BY_QUALITY:])
    fitted = []
    for i, index in enumerate(model.kv_layers):
        k, v = basis["k", i], basis["v", i]
        k_table, v_table = (np.stack([t[kind, i] for t in tiers]).astype(np.int8) for kind in "kv")
        axes = None if v.axes is None else v.axes.astype(np.float16)
        layer = TileLayer(index, model.layer_rope[index], k.mean, v.mean, k_table, v_table, coded.energy["k", i], coded.energy["v", i], axes)
        for short, x in (k.tensors | v.tensors).items():
            setattr(layer, short, x)
        fitted.append(layer)
    return TileCapsule(base_of(model), model.rope_dimensions, list(SMALLER), fitted, model.name,
                       {"images": len(samples), "codec": codec, "layers": layers, "smaller": smaller, "builtin_smaller": builtin, **licence_of(model)})

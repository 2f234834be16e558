"""Fits a capsule of format v2: means, axes of values, tables for every tier. Seconds for a few pictures; four have most of the gain.

`train.smaller` and `train.builtin_smaller` say what a picture becomes at the default quality, coded in axes of the other pictures, and without a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..codec.head import F16
from ..format.base_model import BaseModel, licence_of
from ..format.fingerprint import base_of
from ..format.tile_capsule import TileCapsule, TileLayer
from .coded import SIDE, fit_basis
from .cross import axes_for, cross_coded, sizes
from .source import KVSample, TrainError
from .tables import fit_tables

TYPES = (0, 1, 2, 3, 4, 6, 8, F16)
SMALLER = (10, 8, 6.5, 6, 5.5, 4.75, 4, 3.25, 2.5, 1.95)  # of the tiers
BY_QUALITY = 2  # the first tier that a quality may take; smaller ones are for those who ask for a ratio


def fit_tile_capsule(model: BaseModel, samples: Sequence[KVSample]) -> TileCapsule:
    """From one sample a picture; whole tiles only are learned from. Raises TrainError."""
    samples = [s for s in samples if s.width >= SIDE and len(s.keys[0]) // s.width >= SIDE]
    if not samples:
        raise TrainError("no picture has a tile of 8 x 8 tokens to learn from")
    basis = fit_basis(samples, model, v_axes=axes_for(samples))
    coded = cross_coded(model, samples, TYPES)
    tiers = fit_tables(coded, [16 / x for x in SMALLER])
    smaller, builtin = sizes(coded, tiers[BY_QUALITY:])
    layers = []
    for i, index in enumerate(model.kv_layers):
        k, v = basis["k", i], basis["v", i]
        tables = [np.stack([t[kind, i] for t in tiers]).astype(np.int8) for kind in "kv"]
        axes = None if v.axes is None else v.axes.astype(np.float16)
        layers.append(TileLayer(index, model.layer_rope[index], k.mean, v.mean, *tables, coded.energy["k", i], coded.energy["v", i], axes))
    return TileCapsule(base_of(model), model.rope_dimensions, list(SMALLER), layers, model.name,
                       {"images": len(samples), "smaller": smaller, "builtin_smaller": builtin, **licence_of(model)})

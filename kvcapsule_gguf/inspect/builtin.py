"""The built-in capsule of a model, as a file of it would say it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..codec.builtin import SMALLER
from ..format.base_model import BaseModel, read_base_model
from ..format.fingerprint import base_of
from ..format.tile_capsule import TileCapsule, TileLayer
from ..runtime.errors import KVCapsuleError
from ..train.tables import builtin_tables


def builtin_of(path: Path) -> TileCapsule | None:
    """None if the file is not a model."""
    try:
        return builtin_capsule(read_base_model(path))
    except KVCapsuleError:
        return None


def builtin_capsule(model: BaseModel) -> TileCapsule:
    """smaller: what the head sizes of this model make of it. The energies, which it does not know, are 0."""
    tiers = [builtin_tables(model, x) for x in SMALLER]
    layers = []
    for i, index in enumerate(model.kv_layers):
        k_mean, v_mean = (np.zeros((model.head_count_kv[index], lengths[index]), np.float32) for lengths in (model.key_length, model.value_length))
        k_table, v_table = (np.stack([t[kind, i] for t in tiers]) for kind in "kv")
        layers.append(TileLayer(index, model.layer_rope[index], k_mean, v_mean, k_table, v_table, 0.0, 0.0))
    capsule = TileCapsule(base_of(model), model.rope_dimensions, list(SMALLER), layers, model.name)
    return replace(capsule, smaller=[capsule.f16_bytes() / capsule.slot_bytes(t) for t in range(len(SMALLER))])

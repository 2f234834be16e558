"""A capsule of format v2 as tensors and a JSON config: the second version of a checkpoint (docs/reference/converters.md, format/checkpoint.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .capsule import Base
from .tile_capsule import TileCapsule, TileLayer, complete
from .typed import checked, narrow, of_kind, typed
from .validate import need

VERSION = 2
FIELDS = ("index", "rope", "k_energy", "v_energy")
# of each tensor: the type that a capsule has, and how many dimensions
KINDS = {
    "k_mean": (np.float32, 2), "v_mean": (np.float32, 2), "k_table": (np.uint8, 4), "v_table": (np.uint8, 4), "v_axes": (np.float16, 3),
    "k_transform": (np.float16, 2), "v_transform": (np.float16, 2), "k_order": (np.uint8, 1), "k_near": (np.uint8, 2), "k_gate": (np.float16, 4),
    "k_mlp_up": (np.float16, 3), "k_mlp_bias": (np.float32, 2), "k_mlp_down": (np.float16, 3),
}  # fmt: skip
REQUIRED = ("k_mean", "v_mean", "k_table", "v_table")


def tensors_of(c: TileCapsule, wide: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> tensors, config; wide: what is f16 in f32."""
    tensors = {}
    for i, x in enumerate(c.layers):
        for short, (kind, _) in KINDS.items():
            if (array := getattr(x, short)) is not None:
                tensors[f"layers.{i}.{short}"] = np.ascontiguousarray(array, np.float32 if wide and kind is np.float16 else kind)
    config = {"name": c.name, "provenance": c.provenance, "base": vars(c.base), "rotated": c.rotated}
    return tensors, config | {"layers": [{field: getattr(x, field) for field in FIELDS} for x in c.layers]}


def capsule_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TileCapsule:
    """Takes what it uses out of `tensors`. Raises Invalid and what a config of other types raises."""
    layers = []
    for i, values in enumerate(config["layers"]):
        found = {}
        for short, (kind, dimensions) in KINDS.items():
            name = f"layers.{i}.{short}"
            if short not in REQUIRED and name not in tensors:
                continue
            array = of_kind(name, tensors, "iu" if kind is np.uint8 else "f")
            need(array.ndim == dimensions, f"tensor {name} has {array.ndim} dimensions, not {dimensions}")
            found[short] = narrow(name, array, kind)
        layers.append(TileLayer(**typed(values, TileLayer, FIELDS), **found))
    need(bool(layers), "its config has no layers")
    base = Base(**typed(config["base"], Base, tuple(Base.__annotations__)))
    tiers = layers[0].k_table.shape[0]
    capsule = TileCapsule(base, checked("rotated", config["rotated"], "int"), [0.0] * tiers, layers, **typed(config, TileCapsule, ("name", "provenance")))
    complete(capsule)
    return capsule

"""A capsule as safetensors, for people who train in PyTorch (docs/reference/converters.md): arrays as tensors, the rest as one JSON text. No pickles."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .capsule import Base, CapsuleFileError
from .tile_capsule import TileCapsule, TileLayer, complete
from .typed import checked, narrow, of_kind, typed
from .validate import Invalid, need

FORMAT, VERSION = "kvcapsule-checkpoint", 2
FIELDS = ("index", "rope", "k_energy", "v_energy")
# of each tensor: the type that a capsule has, and how many dimensions
KINDS = {
    "k_mean": (np.float32, 2), "v_mean": (np.float32, 2), "k_table": (np.uint8, 4), "v_table": (np.uint8, 4), "v_axes": (np.float16, 3),
    "k_transform": (np.float16, 2), "v_transform": (np.float16, 2), "k_order": (np.uint8, 1), "k_near": (np.uint8, 2), "k_gate": (np.float16, 4),
    "k_mlp_up": (np.float16, 3), "k_mlp_bias": (np.float32, 2), "k_mlp_down": (np.float16, 3), "narrow": (np.uint8, 1),
}  # fmt: skip
REQUIRED = ("k_mean", "v_mean", "k_table", "v_table")


class CheckpointError(CapsuleFileError):
    """A checkpoint that can not be used; one line."""

    what = "checkpoint"


def write_checkpoint(path: Path, capsule: TileCapsule, outtype: str = "f16") -> Path:
    """outtype: of what a capsule has in f16, f16 or f32; the file appears when it is complete. Raises CapsuleError."""
    from safetensors.numpy import save_file

    wide = outtype == "f32"
    tensors, config = _tensors_of(capsule, wide)
    metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(config, default=_plain)}
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    # safetensors has errors of its own kind for a full disk
    except Exception as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(path, f"can not be written: {' '.join(str(error).split())}") from None
    return path


def read_checkpoint(path: Path) -> TileCapsule:
    """Checked as a capsule file is. Raises CapsuleError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(path, "is not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(path, f"not a capsule checkpoint: its metadata has no format '{FORMAT}'")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(path, f"checkpoint version {metadata.get('version')}, this program reads {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy has not
        raise CheckpointError(path, f"can not be read as safetensors: {' '.join(str(error).split())}") from None
    try:
        capsule = _capsule_of(json.loads(metadata["config"]), tensors)
    except Invalid as error:
        raise CheckpointError(path, str(error)) from None
    except KeyError as error:
        raise CheckpointError(path, f"{error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(path, f"its config can not be used: {' '.join(str(error).split())}") from None
    if tensors:
        raise CheckpointError(path, f"unexpected tensor {min(tensors)}")
    return capsule


def _tensors_of(c: TileCapsule, wide: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> tensors, config; wide: what is f16 in f32."""
    tensors = {}
    for i, x in enumerate(c.layers):
        for short, (kind, _) in KINDS.items():
            if (array := getattr(x, short)) is not None:
                tensors[f"layers.{i}.{short}"] = np.ascontiguousarray(array, np.float32 if wide and kind is np.float16 else kind)
    config = {"name": c.name, "provenance": c.provenance, "base": vars(c.base), "rotated": c.rotated}
    return tensors, config | {"layers": [{field: getattr(x, field) for field in FIELDS} for x in c.layers]}


def _capsule_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TileCapsule:
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
        fields: dict[str, Any] = typed(values, TileLayer, FIELDS) | found
        layers.append(TileLayer(**fields))
    need(bool(layers), "its config has no layers")
    base = Base(**typed(config["base"], Base, tuple(Base.__annotations__)))
    tiers = layers[0].k_table.shape[0]
    capsule = TileCapsule(base, checked("rotated", config["rotated"], "int"), [0.0] * tiers, layers, **typed(config, TileCapsule, ("name", "provenance")))
    complete(capsule)
    return capsule


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)

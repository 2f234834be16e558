"""A capsule as safetensors, for people who train in PyTorch (docs/reference/converters.md): arrays as tensors, the rest as one JSON text. No pickles."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from . import tile_checkpoint
from .capsule import Base, Capsule, CapsuleFileError, Layer, Tier
from .schema import layer_shapes
from .tile_capsule import TileCapsule
from .typed import checked, narrow, of_kind, typed
from .validate import Invalid, validate

FORMAT, VERSION = "kvcapsule-checkpoint", 1  # version 2 is of format v2
WIDE = {"f32": np.float32, "f16": np.float16, "i32": np.int32}
LAYER_FIELDS = ("index", "head_count_kv", "key_length", "value_length", "rope", "freq_base", "kept_count", "mlp_width")
CAPSULE_FIELDS = ("block_size", "block_shape", "block_width", "image_tokens", "neighbour_count", "default_ratio", "name", "provenance")


class CheckpointError(CapsuleFileError):
    """A checkpoint that can not be used; one line."""

    what = "checkpoint"


def write_checkpoint(path: Path, capsule: Capsule | TileCapsule, outtype: str = "f16") -> Path:
    """outtype: of what a capsule has in f16, f16 or f32; the file appears when it is complete. Raises CapsuleError."""
    from safetensors.numpy import save_file

    wide = outtype == "f32"
    version = tile_checkpoint.VERSION if isinstance(capsule, TileCapsule) else VERSION
    tensors, config = tile_checkpoint.tensors_of(capsule, wide) if isinstance(capsule, TileCapsule) else _tensors_of(capsule, wide)
    metadata = {"format": FORMAT, "version": str(version), "config": json.dumps(config, default=_plain)}
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


def read_checkpoint(path: Path) -> Capsule | TileCapsule:
    """Checked as a capsule file of its version is. Raises CapsuleError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(path, "is not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(path, f"not a capsule checkpoint: its metadata has no format '{FORMAT}'")
            make = {str(VERSION): _capsule, str(tile_checkpoint.VERSION): tile_checkpoint.capsule_of}.get(metadata.get("version"))
            if make is None:
                raise CheckpointError(path, f"checkpoint version {metadata.get('version')}, this program reads {VERSION} and {tile_checkpoint.VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy has not
        raise CheckpointError(path, f"can not be read as safetensors: {' '.join(str(error).split())}") from None
    try:
        capsule = make(json.loads(metadata["config"]), tensors)
    except Invalid as error:
        raise CheckpointError(path, str(error)) from None
    except KeyError as error:
        raise CheckpointError(path, f"{error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(path, f"its config can not be used: {' '.join(str(error).split())}") from None
    if tensors:
        raise CheckpointError(path, f"unexpected tensor {min(tensors)}")
    return capsule


def _tensors_of(capsule: Capsule, wide: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> tensors, config; wide: gates and key MLPs in f32."""
    tensors: dict[str, np.ndarray] = {}
    for i, layer in enumerate(capsule.layers):
        for short, (kind, _) in layer_shapes(capsule, layer).items():
            tensors[f"layers.{i}.{short}"] = np.ascontiguousarray(getattr(layer, short), np.float32 if kind == "f16" and wide else WIDE[kind])
        if layer.token_order is not None:
            tensors[f"layers.{i}.token_order"] = np.asarray(layer.token_order, np.int32)
    for name in ("key_codec", "key_rows", "value_rows"):
        tensors[f"tiers.{name}"] = np.array([getattr(t, name) for t in capsule.tiers], np.int32)
    tensors["tiers.kappa"] = np.array([t.kappa for t in capsule.tiers], np.float32)
    config = {field: getattr(capsule, field) for field in CAPSULE_FIELDS}
    config |= {"base": vars(capsule.base), "tiers": [t.name for t in capsule.tiers]}
    return tensors, config | {"layers": [{field: getattr(layer, field) for field in LAYER_FIELDS} for layer in capsule.layers]}


def _capsule(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Capsule:
    """Takes what it uses out of `tensors`."""
    none = np.empty(0, np.float32)
    layers = [Layer(k_mean=none, v_mean=none, k_basis=none, v_basis=none, k_query_weight=none, **typed(x, Layer, LAYER_FIELDS)) for x in config["layers"]]
    rows = {name: of_kind(f"tiers.{name}", tensors, "f" if name == "kappa" else "iu").tolist() for name in ("key_codec", "key_rows", "value_rows", "kappa")}
    tiers = [
        Tier(checked("tiers", name, "str"), rows["key_codec"][i], [tuple(r) for r in rows["key_rows"][i]], [tuple(r) for r in rows["value_rows"][i]], rows["kappa"][i])
        for i, name in enumerate(config["tiers"])
    ]
    base = Base(**typed(config["base"], Base, tuple(Base.__annotations__)))
    capsule = Capsule(base=base, layers=layers, tiers=tiers, **typed(config, Capsule, CAPSULE_FIELDS))
    for i, layer in enumerate(layers):
        for short, (kind, _) in layer_shapes(capsule, layer).items():
            name = f"layers.{i}.{short}"
            setattr(layer, short, narrow(name, of_kind(name, tensors, "iu" if kind == "i32" else "f"), WIDE[kind]))
        name = f"layers.{i}.token_order"
        if name in tensors:
            layer.token_order = narrow(name, of_kind(name, tensors, "iu"), np.uint16)
    capsule.set_ratios()
    validate(capsule)
    return capsule


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)

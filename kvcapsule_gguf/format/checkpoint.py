"""A capsule as safetensors, for people who train in PyTorch (docs/converters.md): arrays as tensors, the rest as one JSON text. No pickles."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .capsule import Base, Capsule, CapsuleFileError, Layer, Tier
from .schema import layer_shapes
from .validate import Invalid, validate

FORMAT, VERSION = "kvcapsule-checkpoint", 1
WIDE = {"f32": np.float32, "f16": np.float16, "i32": np.int32}
LAYER_FIELDS = ("index", "head_count_kv", "key_length", "value_length", "rope", "freq_base", "kept_count", "mlp_width")
CAPSULE_FIELDS = ("block_size", "block_shape", "block_width", "image_tokens", "neighbour_count", "default_ratio", "name", "provenance")


class CheckpointError(CapsuleFileError):
    """A checkpoint that can not be used; one line."""

    what = "checkpoint"


def write_checkpoint(path: Path, capsule: Capsule, outtype: str = "f16") -> Path:
    """outtype: of gates and key MLPs, f16 (as in the capsule) or f32; the file appears when it is complete. Raises CapsuleError."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for i, layer in enumerate(capsule.layers):
        for short, (kind, _) in layer_shapes(capsule, layer).items():
            wide = np.float32 if kind == "f16" and outtype == "f32" else WIDE[kind]
            tensors[f"layers.{i}.{short}"] = np.ascontiguousarray(getattr(layer, short), wide)
        if layer.token_order is not None:
            tensors[f"layers.{i}.token_order"] = np.asarray(layer.token_order, np.int32)
    for name in ("key_codec", "key_rows", "value_rows"):
        tensors[f"tiers.{name}"] = np.array([getattr(t, name) for t in capsule.tiers], np.int32)
    tensors["tiers.kappa"] = np.array([t.kappa for t in capsule.tiers], np.float32)
    config = {field: getattr(capsule, field) for field in CAPSULE_FIELDS}
    config |= {"base": vars(capsule.base), "tiers": [t.name for t in capsule.tiers]}
    config["layers"] = [{field: getattr(layer, field) for field in LAYER_FIELDS} for layer in capsule.layers]
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


def read_checkpoint(path: Path) -> Capsule:
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy has not
        raise CheckpointError(path, f"can not be read as safetensors: {' '.join(str(error).split())}") from None
    try:
        capsule = _capsule(json.loads(metadata["config"]), tensors)
        validate(capsule)
    except Invalid as error:
        raise CheckpointError(path, str(error)) from None
    except KeyError as error:
        raise CheckpointError(path, f"{error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"its config can not be used: {' '.join(str(error).split())}") from None
    if tensors:
        raise CheckpointError(path, f"unexpected tensor {min(tensors)}")
    return capsule


def _capsule(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Capsule:
    """Takes what it uses out of `tensors`."""
    none = np.empty(0, np.float32)
    layers = [Layer(k_mean=none, v_mean=none, k_basis=none, v_basis=none, k_query_weight=none, **{f: x[f] for f in LAYER_FIELDS}) for x in config["layers"]]
    rows = {name: tensors.pop(f"tiers.{name}").tolist() for name in ("key_codec", "key_rows", "value_rows", "kappa")}
    tiers = [
        Tier(name, rows["key_codec"][i], [tuple(r) for r in rows["key_rows"][i]], [tuple(r) for r in rows["value_rows"][i]], rows["kappa"][i])
        for i, name in enumerate(config["tiers"])
    ]
    base = Base(**{**config["base"], "rope_sections": tuple(config["base"]["rope_sections"])})
    capsule = Capsule(base=base, layers=layers, tiers=tiers, **{f: config[f] for f in CAPSULE_FIELDS})
    for i, layer in enumerate(layers):
        for short, (kind, _) in layer_shapes(capsule, layer).items():
            setattr(layer, short, _narrow(f"layers.{i}.{short}", tensors.pop(f"layers.{i}.{short}"), WIDE[kind]))
        order = tensors.pop(f"layers.{i}.token_order", None)
        layer.token_order = None if order is None else order.astype(np.uint16)
    capsule.set_ratios()
    return capsule


def _narrow(name: str, x: np.ndarray, wanted: type) -> np.ndarray:
    """In the type of the capsule; what is finite must stay finite."""
    with np.errstate(over="ignore"):
        out = x.astype(wanted)
    if np.isfinite(x).all() and not np.isfinite(out).all():
        raise Invalid(f"tensor {name} has values too large for {np.dtype(wanted).name}")
    return out


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)

"""A capsule as safetensors, for people who train in PyTorch (docs/converters.md): arrays as tensors, the rest as one JSON text. No pickles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .capsule import Base, Capsule, CapsuleFileError, Layer, Tier
from .schema import layer_shapes
from .validate import Invalid, validate

FORMAT, VERSION = "kvcapsule-checkpoint", 1
MAX_PROVENANCE, MAX_TEXT = 128, 65536
F32_MAX = float(np.finfo(np.float32).max)
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
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(path, f"its config can not be used: {' '.join(str(error).split())}") from None
    if tensors:
        raise CheckpointError(path, f"unexpected tensor {min(tensors)}")
    return capsule


def _capsule(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Capsule:
    """Takes what it uses out of `tensors`."""
    none = np.empty(0, np.float32)
    layers = [Layer(k_mean=none, v_mean=none, k_basis=none, v_basis=none, k_query_weight=none, **_typed(x, Layer, LAYER_FIELDS)) for x in config["layers"]]
    rows = {name: _of_kind(f"tiers.{name}", tensors, "f" if name == "kappa" else "iu").tolist() for name in ("key_codec", "key_rows", "value_rows", "kappa")}
    tiers = [
        Tier(_checked("tiers", name, "str"), rows["key_codec"][i], [tuple(r) for r in rows["key_rows"][i]], [tuple(r) for r in rows["value_rows"][i]], rows["kappa"][i])
        for i, name in enumerate(config["tiers"])
    ]
    base = Base(**_typed(config["base"], Base, tuple(Base.__annotations__)))
    capsule = Capsule(base=base, layers=layers, tiers=tiers, **_typed(config, Capsule, CAPSULE_FIELDS))
    for i, layer in enumerate(layers):
        for short, (kind, _) in layer_shapes(capsule, layer).items():
            name = f"layers.{i}.{short}"
            setattr(layer, short, _narrow(name, _of_kind(name, tensors, "iu" if kind == "i32" else "f"), WIDE[kind]))
        name = f"layers.{i}.token_order"
        if name in tensors:
            layer.token_order = _narrow(name, _of_kind(name, tensors, "iu"), np.uint16)
    capsule.set_ratios()
    return capsule


def _typed(values: Any, cls: type, fields: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass out of JSON, each of its annotated type. Raises Invalid, KeyError, TypeError."""
    return {field: _checked(field, values[field], cls.__annotations__[field]) for field in fields}


def _checked(field: str, x: Any, kind: str) -> Any:
    """A JSON value that a GGUF file can hold as this type. Raises Invalid."""
    if kind.startswith("tuple"):
        x = tuple(_checked(field, v, "int") for v in x)
        good = len(x) == 4
    elif kind.startswith("dict"):
        good = len(x) <= MAX_PROVENANCE and all(_checked(field, key, "str") and _provenance(value) for key, value in x.items())
    else:
        good = {
            "int": lambda: type(x) is int and 0 <= x < 1 << 32,
            "float": lambda: type(x) in (int, float) and abs(x) <= F32_MAX,  # NaN is not
            "bool": lambda: type(x) is bool,
            "str": lambda: type(x) is str and x.isprintable() and len(x) <= MAX_TEXT,
        }[kind]()
    if not good:
        raise Invalid(f"{field} in its config is {json.dumps(x)[:60]}")
    return x


def _provenance(x: Any) -> bool:
    if isinstance(x, list):
        return 0 < len(x) <= MAX_TEXT and all(_checked("provenance", v, "float") is not None for v in x)
    if isinstance(x, (bool, float)):
        return isinstance(x, bool) or math.isfinite(x)
    if isinstance(x, int):
        return -(1 << 63) <= x < 1 << 64
    return _checked("provenance", x, "str") is not None


def _of_kind(name: str, tensors: dict[str, np.ndarray], kinds: str) -> np.ndarray:
    """kinds: of numpy's dtypes. Raises Invalid, KeyError."""
    x = tensors.pop(name)
    if x.dtype.kind not in kinds:
        raise Invalid(f"tensor {name} has type {x.dtype.name}")
    return x


def _narrow(name: str, x: np.ndarray, wanted: type) -> np.ndarray:
    """In the type of the capsule; what is finite must stay finite, and integers must fit."""
    with np.errstate(over="ignore"):
        out = x.astype(wanted)
    fits = np.array_equal(out, x) if x.dtype.kind in "iu" else np.isfinite(out).all() or not np.isfinite(x).all()
    if not fits:
        raise Invalid(f"tensor {name} has values too large for {np.dtype(wanted).name}")
    return out


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)

"""Values out of JSON, and arrays out of safetensors, each of the type that a capsule has."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .validate import Invalid

MAX_PROVENANCE, MAX_TEXT = 128, 65536
F32_MAX = float(np.finfo(np.float32).max)


def typed(values: Any, cls: type, fields: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass out of JSON, each of its annotated type. Raises Invalid, KeyError, TypeError."""
    return {field: checked(field, values[field], cls.__annotations__[field]) for field in fields}


def checked(field: str, x: Any, kind: str) -> Any:
    """A JSON value that a GGUF file can hold as this type. Raises Invalid."""
    if kind.startswith("tuple"):
        x = tuple(checked(field, v, "int") for v in x)
        good = len(x) == 4
    elif kind.startswith("dict"):
        good = len(x) <= MAX_PROVENANCE and all(checked(field, key, "str") and _provenance(value) for key, value in x.items())
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
        return 0 < len(x) <= MAX_TEXT and all(checked("provenance", v, "float") is not None for v in x)
    if isinstance(x, (bool, float)):
        return isinstance(x, bool) or math.isfinite(x)
    if isinstance(x, int):
        return -(1 << 63) <= x < 1 << 64
    return checked("provenance", x, "str") is not None


def of_kind(name: str, tensors: dict[str, np.ndarray], kinds: str) -> np.ndarray:
    """kinds: of numpy's dtypes. Raises Invalid, KeyError."""
    x = tensors.pop(name)
    if x.dtype.kind not in kinds:
        raise Invalid(f"tensor {name} has type {x.dtype.name}")
    return x


def narrow(name: str, x: np.ndarray, wanted: type) -> np.ndarray:
    """In the type of the capsule; what is finite must stay finite, and integers must fit."""
    with np.errstate(over="ignore"):
        out: np.ndarray = x.astype(wanted)
    fits = np.array_equal(out, x) if x.dtype.kind in "iu" else np.isfinite(out).all() or not np.isfinite(x).all()
    if not fits:
        raise Invalid(f"tensor {name} has values too large for {np.dtype(wanted).name}")
    return out

"""A capsule of format v2: means, axes of values and tables of bits, as plain data and as a GGUF sidecar (docs/format-v2.md).

Nothing reads it yet but the reference and the study; the native code follows. Shapes are numpy's (reversed ggml `ne`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..codec.channels import key_groups, plain_groups
from ..codec.head import F16, Head
from ..codec.scale import BITS
from .capsule import ROPE_TYPES, Base, CapsuleFileError
from .gguf_header import GGUFError, Header, read_header
from .schema import MAX_FILE, MAX_HEADER, MAX_KV, MAX_TIERS, MAX_VALUE, tensor_name
from .validate import Invalid, need, read_tensor
from .writer import check_place, whole_file

VERSION = 2
STORED = (0, *BITS, F16)
ROWS = 33  # of a table
PREFIX = "kvcapsule."

# key -> (type, is an array); all are required
KEYS = {
    "version": ("u32", False), "layers": ("u32", True), "layer_rope": ("bool", True), "smaller": ("f32", True),
    "key_energy": ("f32", True), "value_energy": ("f32", True),
    "base.architecture": ("str", False), "base.block_count": ("u32", False), "base.fingerprint": ("str", False),
    "base.head_count_kv": ("u32", True), "base.key_length": ("u32", True), "base.value_length": ("u32", True),
    "base.rope.type": ("str", False), "base.rope.dimension_count": ("u32", False), "base.rope.sections": ("u32", True),
}  # fmt: skip


@dataclass
class TileLayer:
    """H KV heads, key length d_k, value length d_v, T tiers; G groups of keys, of values (codec/channels.py)."""

    index: int
    rope: bool
    k_mean: np.ndarray  # f32 [H, d_k]
    v_mean: np.ndarray  # f32 [H, d_v]
    k_table: np.ndarray  # u8 [T, H, 33, G]: bits of every block, codec/head.py
    v_table: np.ndarray
    k_energy: float  # of a usual tile around the mean: what the errors of a tile are measured by
    v_energy: float
    v_axes: np.ndarray | None = None  # f16 [H, d_v, d_v], columns are axes


@dataclass
class TileCapsule:
    base: Base
    rotated: int  # dimensions with RoPE
    smaller: list[float]  # of each tier, from the smallest: f16 bytes over slot bytes of a whole tile
    layers: list[TileLayer]
    name: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)  # kvcapsule.train.*: str, int, float, bool

    def heads(self, i: int, kind: str, tier: int) -> list[Head]:
        """The codecs of the heads of layer number i; kind: k or v."""
        x = self.layers[i]
        if kind == "k":
            groups = key_groups(x.k_mean.shape[1], self.base.rope_type if x.rope else "none", self.rotated)
            return [Head(mean, groups, table) for mean, table in zip(x.k_mean, x.k_table[tier])]
        groups = plain_groups(x.v_mean.shape[1])
        axes = [None] * len(x.v_mean) if x.v_axes is None else list(x.v_axes.astype(np.float32))
        return [Head(mean, groups, table, a) for mean, table, a in zip(x.v_mean, x.v_table[tier], axes)]

    def slot_bytes(self, tier: int, height: int = 8, width: int = 8) -> int:
        """Bytes of a slot of all layers, without units of allocation."""
        return sum(h.size(height, width) for i in range(len(self.layers)) for kind in "kv" for h in self.heads(i, kind, tier))

    def f16_bytes(self) -> int:
        return sum(2 * 64 * (x.k_mean.size + x.v_mean.size) for x in self.layers)


def shapes(c: TileCapsule, x: TileLayer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Short name -> (ggml type, numpy shape) of the tensors of a layer."""
    heads, d_k = x.k_mean.shape
    d_v = x.v_mean.shape[1]
    groups = len(key_groups(d_k, c.base.rope_type if x.rope else "none", c.rotated)), len(plain_groups(d_v))
    tiers = len(c.smaller)
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "k_mean": ("f32", (heads, d_k)), "v_mean": ("f32", (heads, d_v)),
        "k_table": ("i8", (tiers, heads, ROWS, groups[0])), "v_table": ("i8", (tiers, heads, ROWS, groups[1])),
    }  # fmt: skip
    if x.v_axes is not None:
        out["v_axes"] = ("f16", (heads, d_v, d_v))
    return out


def validate(c: TileCapsule) -> None:
    """Raises Invalid."""
    validate_layers(c)
    need(all(a > b for a, b in zip(c.smaller, c.smaller[1:])), f"{PREFIX}smaller does not fall")
    for t, smaller in enumerate(c.smaller):
        got = c.f16_bytes() / max(c.slot_bytes(t), 1)
        need(smaller > 0 and abs(got / smaller - 1) <= 1e-3, f"{PREFIX}smaller of tier {t} is {smaller:.3f}, its tables give {got:.3f}")


def validate_layers(c: TileCapsule) -> None:
    """Everything but the sizes of the tiers. Raises Invalid."""
    need(c.base.rope_type in ROPE_TYPES, f"{PREFIX}base.rope.type is not one of {', '.join(ROPE_TYPES)}")
    need(1 <= len(c.smaller) <= MAX_TIERS, f"{PREFIX}smaller has {len(c.smaller)} tiers, not 1..{MAX_TIERS}")
    need(1 <= len(c.layers) <= c.base.block_count, f"{PREFIX}layers has {len(c.layers)} layers of a model of {c.base.block_count}")
    for i, x in enumerate(c.layers):
        need(i == 0 or x.index > c.layers[i - 1].index, f"{PREFIX}layers does not ascend")
        need(x.index < c.base.block_count, f"{PREFIX}layers names layer {x.index} of a model of {c.base.block_count}")
        need(0 <= c.rotated <= x.k_mean.shape[1] and c.rotated % 2 == 0, f"{PREFIX}base.rope.dimension_count {c.rotated} does not fit layer {x.index}")
        for short in ("k_energy", "v_energy"):
            need(0 < getattr(x, short) < 1e30, f"{PREFIX}{short} of layer {x.index} is not a positive number")
        for short, (_, shape) in shapes(c, x).items():
            array, name = getattr(x, short), tensor_name(x.index, short)
            need(array.shape == shape, f"tensor {name} has shape {list(array.shape[::-1])}, not {list(shape[::-1])}")
            if short.endswith("table"):
                need(bool(np.isin(array, STORED).all()), f"tensor {name} has a number of bits that is not one of {', '.join(map(str, STORED))}")
            else:
                need(bool((np.abs(array) <= MAX_VALUE).all()), f"tensor {name} has values that are not finite or too large for f16")
        if x.v_axes is not None:
            a = x.v_axes.astype(np.float32)
            off = np.abs(a.swapaxes(1, 2) @ a - np.eye(a.shape[1], dtype=np.float32)).max()
            need(off <= 0.01, f"tensor {tensor_name(x.index, 'v_axes')} is not orthonormal")


def write_tile_capsule(path: str | Path, c: TileCapsule) -> Path:
    """Fills in how much smaller the tiers are, validates, and writes; the file appears only when it is complete. Raises CapsuleError."""
    path, v = Path(path), gguf.GGUFValueType
    check_place(path)
    try:
        validate_layers(c)
        c.smaller = [c.f16_bytes() / max(c.slot_bytes(t), 1) for t in range(len(c.smaller))]
        validate(c)
    except Invalid as e:
        raise CapsuleFileError(path, str(e)) from None
    types = {"u32": v.UINT32, "f32": v.FLOAT32, "bool": v.BOOL, "str": v.STRING}
    with whole_file(path, c.base.architecture) as w:
        w.add_type("adapter")
        w.add_string("adapter.type", "kvcapsule")
        if c.name:
            w.add_name(c.name)
        for key, value in _values(c).items():
            kind, array = KEYS[key]
            w.add_key_value(PREFIX + key, value, *((v.ARRAY, types[kind]) if array else (types[kind],)))
        for key, value in c.provenance.items():
            kind = {bool: v.BOOL, int: v.INT64, float: v.FLOAT64}.get(type(value), v.STRING)
            w.add_key_value(f"{PREFIX}train.{key}", str(value) if kind is v.STRING else value, kind)
        for x in c.layers:
            for short, (kind, _) in shapes(c, x).items():
                w.add_tensor(tensor_name(x.index, short), np.ascontiguousarray(getattr(x, short), {"f32": "<f4", "f16": "<f2", "i8": "i1"}[kind]))
    return path


def _values(c: TileCapsule) -> dict[str, Any]:
    heads = [x.k_mean.shape[0] for x in c.layers]
    return {
        "version": VERSION, "layers": [x.index for x in c.layers], "layer_rope": [x.rope for x in c.layers], "smaller": [float(x) for x in c.smaller],
        "key_energy": [float(x.k_energy) for x in c.layers], "value_energy": [float(x.v_energy) for x in c.layers],
        "base.architecture": c.base.architecture, "base.block_count": c.base.block_count, "base.fingerprint": c.base.fingerprint,
        "base.head_count_kv": heads, "base.key_length": [x.k_mean.shape[1] for x in c.layers], "base.value_length": [x.v_mean.shape[1] for x in c.layers],
        "base.rope.type": c.base.rope_type, "base.rope.dimension_count": c.rotated, "base.rope.sections": list(c.base.rope_sections),
    }  # fmt: skip


def read_tile_capsule(path: str | Path) -> TileCapsule:
    """Checks everything that can be checked without the base model. Raises CapsuleError."""
    path = Path(path)
    try:
        return _read(read_header(path, lambda key: key.startswith((PREFIX, "general.", "adapter."))))
    except (GGUFError, Invalid) as e:
        raise CapsuleFileError(path, str(e)) from None
    except OSError as e:
        raise CapsuleFileError(path, f"can not be read: {e.strerror or e}") from None


def _read(h: Header) -> TileCapsule:
    need(h.size <= MAX_FILE, f"the file has {h.size} bytes, more than 1 GiB")
    need(h.n_kv <= MAX_KV and h.end <= MAX_HEADER, "a header that is too large")
    need(not h.skipped, f"unknown key {h.skipped}")
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "kvcapsule")):
        value = h.values.get(key)
        need(value is not None and (value.type, value.array, value.data) == ("str", False, wanted), f"not a capsule: key {key} is not '{wanted}'")
    get: dict[str, Any] = {}
    for key, (kind, array) in KEYS.items():
        value = h.values.get(PREFIX + key)
        need(value is not None, f"key {PREFIX}{key} is missing")
        need((value.type, value.array) == (kind, array), f"key {PREFIX}{key} is not {'an array of ' if array else ''}{kind}")
        get[key] = value.data.tolist() if isinstance(value.data, np.ndarray) else value.data
        if key == "version":
            need(get[key] == VERSION, f"{PREFIX}version: format version {get[key]}, this program reads version {VERSION}")
    for key in sorted(h.values):
        short = key.removeprefix(PREFIX)
        need(short in KEYS or short.startswith("train.") or not key.startswith(PREFIX), f"unknown key {key}")
    n = len(get["layers"])
    for key in ("layer_rope", "key_energy", "value_energy", "base.head_count_kv", "base.key_length", "base.value_length"):
        need(len(get[key]) == n, f"key {PREFIX}{key} has {len(get[key])} elements, not {n}")
    need(len(get["base.rope.sections"]) == 4, f"key {PREFIX}base.rope.sections has not 4 elements")
    need(1 <= len(get["smaller"]) <= MAX_TIERS, f"{PREFIX}smaller has {len(get['smaller'])} tiers, not 1..{MAX_TIERS}")
    base = Base(get["base.architecture"], get["base.block_count"], get["base.fingerprint"], get["base.rope.type"], tuple(get["base.rope.sections"]))
    name = h.values.get("general.name")
    c = TileCapsule(base, get["base.rope.dimension_count"], get["smaller"], [], name.data if name is not None and name.type == "str" else "")
    c.provenance = {k.removeprefix(f"{PREFIX}train."): x.data for k, x in h.values.items() if k.startswith(f"{PREFIX}train.")}
    need(base.rope_type in ROPE_TYPES, f"{PREFIX}base.rope.type is not one of {', '.join(ROPE_TYPES)}")
    expected = set()
    for i in range(n):
        heads, d_k, d_v = (get[f"base.{x}"][i] for x in ("head_count_kv", "key_length", "value_length"))
        need(1 <= heads <= 4096 and 1 <= d_k <= 65536 and 1 <= d_v <= 65536, f"the heads of layer {get['layers'][i]} are not possible")
        need(c.rotated <= d_k and c.rotated % 2 == 0, f"{PREFIX}base.rope.dimension_count {c.rotated} does not fit layer {get['layers'][i]}")
        none = np.zeros((heads, 0), np.float32)
        x = TileLayer(
            get["layers"][i], get["layer_rope"][i], np.zeros((heads, d_k), np.float32), np.zeros((heads, d_v), np.float32), none, none,
            get["key_energy"][i], get["value_energy"][i],
        )  # fmt: skip
        x.v_axes = none if tensor_name(x.index, "v_axes") in h.tensors else None
        for short, (kind, shape) in shapes(c, x).items():
            tensor = tensor_name(x.index, short)
            expected.add(tensor)
            setattr(x, short, read_tensor(h, tensor, kind, shape))
        c.layers.append(x)
    for tensor in h.tensors:
        need(tensor in expected, f"unexpected tensor {tensor}")
    validate(c)
    return c

"""A capsule of format v2: means, axes of values, transforms and tables of bits, as plain data and as a GGUF sidecar (docs/reference/format-v2.md).

Shapes are numpy's (reversed ggml `ne`). The C++ reader (src/capsule/format) refuses the same files with the same lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..codec.channels import key_groups, plain_groups
from ..codec.head import F16, F32, Head
from .capsule import ROPE_TYPES, Base, CapsuleFileError
from .gguf_header import GGUFError
from .reader import array_of, check_cover, check_names, is_string, read_keys
from .schema import MAX_HEAD, MAX_HEADS, MAX_MEAN, MAX_TIERS, MAX_VALUE, tensor_name
from .tile_transform import Shapes, check_near, check_order, ggml_shape, transform_shapes, whole_of
from .validate import Invalid, need, read_tensor
from .writer import add_general, check_place, whole_file

VERSION = 2
STORED = (0, 1, 2, 3, 4, 6, 8, F16, F32)
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
    narrow: np.ndarray | None = None  # u8 [H], 1: the head needs no other image while an image is read
    # in place of the DCT of whole tiles (codec/transform.py): k_transform, or the tokens that are kept and what the others are predicted by
    k_transform: np.ndarray | None = None  # f16 [64, 64]
    v_transform: np.ndarray | None = None
    k_order: np.ndarray | None = None  # u8 [64]
    k_near: np.ndarray | None = None  # u8 [64 - kept, K]
    k_gate: np.ndarray | None = None  # f16 [H, 64 - kept, K, 16 G]: for both channels of a lane
    k_mlp_up: np.ndarray | None = None  # f16 [H, h, K * d_k]
    k_mlp_bias: np.ndarray | None = None  # f32 [H, h]
    k_mlp_down: np.ndarray | None = None  # f16 [H, d_k, h]


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
        there = tensors_of(x)
        if kind == "k":
            groups = key_groups(x.k_mean.shape[1], self.base.rope_type if x.rope else "none", self.rotated)
            return [Head(mean, groups, table, whole=whole_of(there, kind, h, groups)) for h, (mean, table) in enumerate(zip(x.k_mean, x.k_table[tier]))]
        groups = plain_groups(x.v_mean.shape[1])
        axes = [None] * len(x.v_mean) if x.v_axes is None else list(x.v_axes.astype(np.float32))
        return [Head(mean, groups, table, a, whole_of(there, kind, h, groups)) for h, (mean, table, a) in enumerate(zip(x.v_mean, x.v_table[tier], axes))]

    @property
    def first_tier(self) -> int:
        """The smallest tier that a quality may take, of about 6.5x; smaller ones are for those who ask for a ratio."""
        return next((t for t, smaller in enumerate(self.smaller) if smaller < 7), len(self.smaller) - 1)

    def slot_bytes(self, tier: int, height: int = 8, width: int = 8) -> int:
        """Bytes of a slot of all layers, without units of allocation."""
        return sum(h.size(height, width) for i in range(len(self.layers)) for kind in "kv" for h in self.heads(i, kind, tier))

    def f16_bytes(self) -> int:
        return sum(2 * 64 * (x.k_mean.size + x.v_mean.size) for x in self.layers)


# all that a layer may have
TENSORS = tuple(f.name for f in fields(TileLayer) if "ndarray" in str(f.type))


def shapes(c: TileCapsule, x: TileLayer, heads: int, d_k: int, d_v: int, there: Mapping[str, tuple[int, ...]]) -> Shapes:
    """there: short name -> ggml shape of the tensors that the layer has -> short name -> (ggml type, numpy shape) of those it must have. Raises Invalid."""
    groups = len(key_groups(d_k, c.base.rope_type if x.rope else "none", c.rotated)), len(plain_groups(d_v))
    tiers = len(c.smaller)
    out: Shapes = {
        "k_mean": ("f32", (heads, d_k)), "v_mean": ("f32", (heads, d_v)),
        "k_table": ("i8", (tiers, heads, ROWS, groups[0])), "v_table": ("i8", (tiers, heads, ROWS, groups[1])),
    }  # fmt: skip
    if "v_axes" in there:
        out["v_axes"] = ("f16", (heads, d_v, d_v))
    if "narrow" in there:
        out["narrow"] = ("i8", (heads,))
    return out | transform_shapes(there, tensor_name(x.index, "k_near"), heads, d_k, groups[0])


def tensors_of(x: TileLayer) -> dict[str, np.ndarray]:
    return {short: array for short in TENSORS if (array := getattr(x, short)) is not None}


def validate_base(c: TileCapsule, n_layers: int) -> None:
    """Everything but layers and tensors. Raises Invalid."""
    need(c.base.architecture != "", f"{PREFIX}base.architecture is empty")
    need(c.base.rope_type in ROPE_TYPES, f"{PREFIX}base.rope.type is not one of {', '.join(ROPE_TYPES)}")
    need(re.fullmatch("[0-9a-f]{64}", c.base.fingerprint) is not None, f"{PREFIX}base.fingerprint is not 64 hex digits")
    need(1 <= len(c.smaller) <= MAX_TIERS, f"{PREFIX}smaller has {len(c.smaller)} tiers, not 1..{MAX_TIERS}")
    for t, smaller in enumerate(c.smaller):
        need(0 < smaller < math.inf, f"{PREFIX}smaller of tier {t} is not a positive number")
        need(t == 0 or smaller < c.smaller[t - 1], f"{PREFIX}smaller does not fall")
    need(1 <= n_layers <= c.base.block_count, f"{PREFIX}layers has {n_layers} layers of a model of {c.base.block_count}")


def validate_layer(c: TileCapsule, i: int, heads: int, d_k: int, d_v: int) -> None:
    """Layer number i of the file, without its tensors. Raises Invalid."""
    x = c.layers[i]
    at = f"of layer {x.index}"
    need(i == 0 or x.index > c.layers[i - 1].index, f"{PREFIX}layers does not ascend")
    need(x.index < c.base.block_count, f"{PREFIX}layers names layer {x.index} of a model of {c.base.block_count}")
    for key, value, most in (("head_count_kv", heads, MAX_HEADS), ("key_length", d_k, MAX_HEAD), ("value_length", d_v, MAX_HEAD)):
        need(1 <= value <= most, f"{PREFIX}base.{key} {at} is {value}")
    need(c.rotated <= d_k and c.rotated % 2 == 0, f"{PREFIX}base.rope.dimension_count {c.rotated} does not fit layer {x.index}")
    for key, energy in (("key_energy", x.k_energy), ("value_energy", x.v_energy)):
        need(0 < energy < 1e30, f"{PREFIX}{key} {at} is not a positive number")


def validate_tensor(name: str, short: str, array: np.ndarray) -> None:
    """Raises Invalid."""
    if short.endswith("table"):
        need(bool(np.isin(array, STORED).all()), f"tensor {name} has a number of bits that is not one of {', '.join(map(str, STORED))}")
        return
    if short == "narrow":
        need(bool(np.isin(array, (0, 1)).all()), f"tensor {name} has a value that is neither 0 nor 1")
        return
    if short in ("k_order", "k_near"):
        (check_order if short == "k_order" else check_near)(name, array)
        return
    need(bool((np.abs(array) <= MAX_VALUE).all()), f"tensor {name} has values that are not finite or too large for f16")
    if short.endswith("mean"):
        need(bool((np.abs(array) <= MAX_MEAN).all()), f"tensor {name} has values beyond +-{MAX_MEAN:.0f}: keys and values could overflow f16")
    elif short in ("v_axes", "k_transform", "v_transform"):
        a = array.astype(np.float32)
        off = np.abs(a.swapaxes(-1, -2) @ a - np.eye(a.shape[-1], dtype=np.float32)).max()
        need(off <= 0.01, f"tensor {name} is not orthonormal")


def validate_sizes(c: TileCapsule) -> None:
    """The tiers are as small as they say. Raises Invalid."""
    for t, smaller in enumerate(c.smaller):
        size = c.slot_bytes(t)
        need(size > 0, f"tier {t} stores nothing")
        got = c.f16_bytes() / size
        need(abs(got / smaller - 1) <= 1e-3, f"{PREFIX}smaller of tier {t} is {smaller:.3f}, its tables give {got:.3f}")


def _sizes(x: TileLayer) -> tuple[int, int, int]:
    """KV heads, key length, value length."""
    heads, d_k = x.k_mean.shape
    return heads, d_k, x.v_mean.shape[1]


def complete(c: TileCapsule) -> None:
    """Fills in how much smaller the tiers are. Raises Invalid for what no reader would take."""
    for i, x in enumerate(c.layers):
        sizes = _sizes(x)
        validate_layer(c, i, *sizes)
        there = tensors_of(x)
        wanted = shapes(c, x, *sizes, {short: ggml_shape(array) for short, array in there.items()})
        for short in there:
            need(short in wanted, f"unexpected tensor {tensor_name(x.index, short)}")
        for short, (_, shape) in wanted.items():
            array, name = there.get(short), tensor_name(x.index, short)
            if array is None:
                raise Invalid(f"tensor {name} is missing")
            need(array.shape == shape, f"tensor {name} has shape {list(array.shape[::-1])}, not {list(shape[::-1])}")
            validate_tensor(name, short, array)
    c.smaller = [c.f16_bytes() / max(c.slot_bytes(t), 1) for t in range(len(c.smaller))]
    validate_base(c, len(c.layers))
    validate_sizes(c)


def write_tile_capsule(path: str | Path, c: TileCapsule) -> Path:
    """Fills in how much smaller the tiers are, validates, and writes; the file appears only when it is complete. Raises CapsuleError."""
    path = Path(path)
    check_place(path)
    try:
        complete(c)
    except Invalid as e:
        raise CapsuleFileError(path, str(e)) from None
    with whole_file(path, c.base.architecture) as w:
        add_general(w, c.name, c.provenance)
        add_tile_capsule(w, c)
    return path


def add_tile_capsule(w: gguf.GGUFWriter, c: TileCapsule) -> None:
    """The keys under `kvcapsule.` and the tensors of a complete capsule, which may also ride inside an mmproj file."""
    v = gguf.GGUFValueType
    types = {"u32": v.UINT32, "f32": v.FLOAT32, "bool": v.BOOL, "str": v.STRING}
    for key, value in _values(c).items():
        kind, array = KEYS[key]
        w.add_key_value(PREFIX + key, value, *((v.ARRAY, types[kind]) if array else (types[kind],)))
    for key, value in c.provenance.items():
        stored = {bool: v.BOOL, int: v.INT64, float: v.FLOAT64}.get(type(value), v.STRING)
        w.add_key_value(f"{PREFIX}train.{key}", str(value) if stored is v.STRING else value, stored)
    for x in c.layers:
        there = tensors_of(x)
        for short, (kind, _) in shapes(c, x, *_sizes(x), {short: ggml_shape(array) for short, array in there.items()}).items():
            w.add_tensor(tensor_name(x.index, short), np.ascontiguousarray(there[short], {"f32": "<f4", "f16": "<f2", "i8": "i1"}[kind]))


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
    """A sidecar, or the capsule inside an mmproj file; checks everything that can be checked without the base model. Raises CapsuleError."""
    path = Path(path)
    try:
        return _read(path)
    except (GGUFError, Invalid) as e:
        raise CapsuleFileError(path, str(e)) from None
    except OSError as e:
        raise CapsuleFileError(path, f"can not be read: {e.strerror or e}") from None


def _read(path: Path) -> TileCapsule:
    h, sidecar = read_keys(path, {PREFIX + key: kind for key, kind in KEYS.items()}, VERSION)
    get = {key: h.values[PREFIX + key].data for key in KEYS}
    n = len(get["layers"])

    def per_layer(key: str) -> list[Any]:
        return array_of(h, PREFIX + key, n).tolist()

    sections = tuple(array_of(h, f"{PREFIX}base.rope.sections", 4).tolist())
    base = Base(get["base.architecture"], get["base.block_count"], get["base.fingerprint"], get["base.rope.type"], sections)
    name = h.values["general.name"].data if sidecar and is_string(h, "general.name") else ""
    c = TileCapsule(base, get["base.rope.dimension_count"], get["smaller"].tolist(), [], name)
    c.provenance = {k.removeprefix(f"{PREFIX}train."): x.data for k, x in h.values.items() if k.startswith(f"{PREFIX}train.")}
    validate_base(c, n)
    rope, k_energy, v_energy = (per_layer(key) for key in ("layer_rope", "key_energy", "value_energy"))
    heads, d_k, d_v = (per_layer(f"base.{x}") for x in ("head_count_kv", "key_length", "value_length"))
    none = np.empty(0, np.float32)
    c.layers = [TileLayer(int(index), rope[i], none, none, none, none, k_energy[i], v_energy[i]) for i, index in enumerate(get["layers"])]
    for i in range(len(c.layers)):
        validate_layer(c, i, heads[i], d_k[i], d_v[i])
    if sidecar:
        check_cover(h)
    expected = set()
    for x, sizes in zip(c.layers, zip(heads, d_k, d_v)):
        there = {short: h.tensors[name].ne4 for short in TENSORS if (name := tensor_name(x.index, short)) in h.tensors}
        for short, (kind, shape) in shapes(c, x, *sizes, there).items():
            tensor = tensor_name(x.index, short)
            expected.add(tensor)
            setattr(x, short, read_tensor(h, tensor, kind, shape))
            validate_tensor(tensor, short, getattr(x, short))
    check_names(h, expected, sidecar)
    validate_sizes(c)
    return c

"""Writes a capsule as a GGUF sidecar."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .capsule import VERSION, Capsule, CapsuleFileError
from .gguf_header import GGUFError, read_header
from .schema import layer_shapes, tensor_name
from .validate import Invalid, validate

_V = gguf.GGUFValueType
_DTYPES = {"f32": np.float32, "f16": np.float16, "i32": np.int32}


def write_capsule(path: str | Path, capsule: Capsule) -> Path:
    """Fills in the tiers' ratios, validates, and writes; the file appears under its name only when it is complete. Raises CapsuleError."""
    path = Path(path)
    check_place(path)
    capsule.set_ratios()
    try:
        validate(capsule)
    except Invalid as e:
        raise CapsuleFileError(path, str(e)) from None
    with whole_file(path, capsule.base.architecture) as writer:
        add_metadata(writer, capsule)
        add_tensors(writer, capsule)
    return path


def check_place(path: Path) -> None:
    """A capsule takes the place of another one, but not of a model, a projector or anything else. Raises CapsuleError."""
    if not os.path.lexists(path):
        return
    try:
        kind = read_header(path, "adapter.type".__eq__).values.get("adapter.type") if path.is_file() else None
    except (GGUFError, OSError):
        kind = None
    if kind is None or kind.data != "kvcapsule":
        raise CapsuleFileError(path, "is there already and is no capsule: choose another name, or remove it first")


@contextmanager
def whole_file(path: Path, architecture: str, error: type[CapsuleFileError] = CapsuleFileError) -> Iterator[gguf.GGUFWriter]:
    """A writer to fill; afterwards the file takes its name, or nothing of it is left where it could not be written. Raises `error`."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as e:
        part.unlink(missing_ok=True)
        raise error(path, f"can not be written: {e.strerror or 'the disk is full'}") from None  # numpy gives no reason
    finally:
        with suppress(OSError):  # what is left in a buffer of a full disk
            writer.close()
    os.replace(part, path)


def add_metadata(w: gguf.GGUFWriter, c: Capsule) -> None:
    """general.architecture is the writer's own."""
    add_general(w, c.name, c.provenance)
    add_capsule_keys(w, c)


def add_general(w: gguf.GGUFWriter, name: str, provenance: Mapping[str, Any]) -> None:
    """What any program says of a file. A capsule comes out of its model, so it has the licence of the model."""
    w.add_type("adapter")
    w.add_string("adapter.type", "kvcapsule")
    if name:
        w.add_name(name)
    licence = str(provenance.get("license", ""))
    if licence and licence.isascii() and licence.isprintable():
        w.add_license(licence)


def add_capsule_keys(w: gguf.GGUFWriter, c: Capsule) -> None:
    """The keys under `kvcapsule.`, which may also ride inside an mmproj file."""
    layers, tiers, base = c.layers, c.tiers, c.base

    def array(key: str, values: Iterable[Any], kind: gguf.GGUFValueType) -> None:
        convert = {_V.UINT32: int, _V.UINT16: int, _V.FLOAT32: float, _V.BOOL: bool, _V.STRING: str}[kind]
        w.add_key_value(f"kvcapsule.{key}", [convert(v) for v in values], _V.ARRAY, kind)

    w.add_uint32("kvcapsule.version", VERSION)
    w.add_uint32("kvcapsule.block_size", c.block_size)
    w.add_string("kvcapsule.block_shape", c.block_shape)
    w.add_uint32("kvcapsule.block_width", c.block_width)
    w.add_uint32("kvcapsule.image_tokens", c.image_tokens)
    array("layers", (x.index for x in layers), _V.UINT32)
    array("layer_rope", (x.rope for x in layers), _V.BOOL)
    w.add_string("kvcapsule.base.architecture", base.architecture)
    w.add_uint32("kvcapsule.base.block_count", base.block_count)
    array("base.head_count_kv", (x.head_count_kv for x in layers), _V.UINT32)
    array("base.key_length", (x.key_length for x in layers), _V.UINT32)
    array("base.value_length", (x.value_length for x in layers), _V.UINT32)
    w.add_string("kvcapsule.base.rope.type", base.rope_type)
    array("base.rope.sections", base.rope_sections, _V.UINT32)
    array("base.rope.freq_base", (x.freq_base for x in layers), _V.FLOAT32)
    w.add_string("kvcapsule.base.fingerprint", base.fingerprint)
    array("mlp_width", (x.mlp_width for x in layers), _V.UINT32)
    array("kept_count", (x.kept_count for x in layers), _V.UINT32)
    w.add_uint32("kvcapsule.neighbour_count", c.neighbour_count)
    identity = np.arange(c.block_size)
    array("token_order", np.concatenate([identity if x.token_order is None else x.token_order for x in layers]), _V.UINT16)
    array("tier.name", (t.name for t in tiers), _V.STRING)
    array("tier.ratio", (t.ratio for t in tiers), _V.FLOAT32)
    array("tier.key_codec", (x for t in tiers for x in t.key_codec), _V.UINT32)
    array("tier.key_rows", (n for t in tiers for rows in t.key_rows for n in rows), _V.UINT32)
    array("tier.value_rows", (n for t in tiers for rows in t.value_rows for n in rows), _V.UINT32)
    array("tier.kappa", (x for t in tiers for x in t.kappa), _V.FLOAT32)
    w.add_float32("kvcapsule.default_ratio", c.default_ratio)
    for key, value in c.provenance.items():
        if isinstance(value, (list, np.ndarray)):
            array(f"train.{key}", value, _V.FLOAT32)
            continue
        kind = {bool: _V.BOOL, int: _V.UINT64 if isinstance(value, int) and value >= 0 else _V.INT64, float: _V.FLOAT64}.get(type(value), _V.STRING)
        w.add_key_value(f"kvcapsule.train.{key}", str(value) if kind is _V.STRING else value, kind)


def add_tensors(w: gguf.GGUFWriter, c: Capsule) -> None:
    for layer in c.layers:
        for short, (kind, shape) in layer_shapes(c, layer).items():
            data = np.ascontiguousarray(getattr(layer, short), dtype=_DTYPES[kind])
            assert data.shape == shape
            w.add_tensor(tensor_name(layer.index, short), data)

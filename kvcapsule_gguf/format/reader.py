"""Reads a capsule file and checks everything that can be checked without the base model."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..codec.types import ROW_TYPES
from .capsule import VERSION, Base, Capsule, CapsuleFileError, Layer, Tier
from .gguf_header import GGUFError, Header, padded, read_header
from .schema import INFIX, KEYS, MAX_BLOCK, MAX_FILE, MAX_HEADER, MAX_KV, MAX_TIERS, MIN_BLOCK, layer_shapes, tensor_name
from .validate import Invalid, need, read_tensor, validate_metadata, validate_tensors


def read_capsule(path: str | Path) -> Capsule:
    """A sidecar, or the capsule inside an mmproj file. Raises CapsuleError."""
    path = Path(path)
    try:
        return _read(path)
    except (GGUFError, Invalid) as e:
        raise CapsuleFileError(path, str(e)) from None
    except OSError as e:
        raise CapsuleFileError(path, f"can not be read: {e.strerror or e}") from None


def has_capsule(path: str | Path) -> bool:
    """Whether the file is a capsule, or an mmproj with one inside; False for anything else, damaged or not."""
    return capsule_version(path) is not None


def capsule_version(path: str | Path) -> Any:
    """What the file says, or None if it says nothing: it is no capsule, or damaged."""
    try:
        value = read_header(path, lambda key: key == "kvcapsule.version").values.get("kvcapsule.version")
    except (GGUFError, OSError):
        return None
    return value and value.data


def read_keys(path: Path, keys: Mapping[str, tuple[str, bool]], version: int) -> tuple[Header, bool]:
    """The header of a capsule of this format version, and whether it is a sidecar; keys: name -> (type, is an array), the version first. Raises GGUFError, Invalid."""
    header = read_header(path, lambda key: key.startswith(("kvcapsule.", "general.", "adapter.")))
    sidecar = "adapter.type" in header.values
    if sidecar:
        need(header.size <= MAX_FILE, f"the file has {header.size} bytes, more than 1 GiB")
        need(header.n_kv <= MAX_KV, f"{header.n_kv} keys, more than {MAX_KV}")
        need(not header.skipped, f"unknown key {header.skipped}")
    need("kvcapsule.version" in header.values, "not a capsule: key kvcapsule.version is missing")
    need(header.end <= MAX_HEADER, "a header of more than 64 MiB")
    if sidecar:
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "kvcapsule")):
            need(is_string(header, key) and header.values[key].data == wanted, f"not a capsule: key {key} is not '{wanted}'")
    for key, (kind, array) in keys.items():
        _check_type(header, key, kind, array)
        if key == "kvcapsule.version":
            found = header.values[key].data
            need(found != 1 or version == 1, "a capsule of format v1: train it anew with kvcapsule-train")
            need(found == version, f"kvcapsule.version: format version {found}, this program reads version 2: update it")
    for key in sorted(header.values):
        known = key in keys or key.startswith("kvcapsule.train.") or not key.startswith("kvcapsule.")
        need(known, f"unknown key {key}")
    if sidecar:
        arch = _get(header, "kvcapsule.base.architecture")
        need(
            is_string(header, "general.architecture") and header.values["general.architecture"].data == arch,
            "general.architecture is not kvcapsule.base.architecture",
        )
    return header, sidecar


def _read(path: Path) -> Capsule:
    header, sidecar = read_keys(path, KEYS, VERSION)
    capsule = _metadata(header)
    if sidecar and is_string(header, "general.name"):
        capsule.name = header.values["general.name"].data
    validate_metadata(capsule)
    _tensors(header, capsule, sidecar)
    validate_tensors(capsule)
    return capsule


def is_string(header: Header, key: str) -> bool:
    value = header.values.get(key)
    return value is not None and (value.type, value.array) == ("str", False)


def _check_type(header: Header, key: str, kind: str, array: bool) -> None:
    value = header.values.get(key)
    need(value is not None, f"key {key} is missing")
    wanted = f"an array of {kind}" if array else kind
    found = f"an array of {value.type}" if value.array else value.type
    need((value.type, value.array) == (kind, array), f"key {key} is {found}, not {wanted}")


def _get(header: Header, key: str) -> Any:
    return header.values[key].data


def array_of(header: Header, key: str, n: int) -> Any:
    """The elements of an array that has to have `n` of them. Raises Invalid."""
    data = _get(header, key)
    need(len(data) == n, f"key {key} has {len(data)} elements, not {n}")
    return data


def _metadata(h: Header) -> Capsule:
    """Everything but the tensors."""
    layers = _get(h, "kvcapsule.layers").tolist()
    tiers = _get(h, "kvcapsule.tier.name")
    n = _get(h, "kvcapsule.block_size")
    need(MIN_BLOCK <= n <= MAX_BLOCK, f"kvcapsule.block_size is {n}, not in {MIN_BLOCK}..{MAX_BLOCK}")
    n_layers = len(layers)
    sections = tuple(array_of(h, "kvcapsule.base.rope.sections", 4).tolist())

    def per_layer(key: str) -> list[Any]:
        return array_of(h, key, n_layers).tolist()

    rope, freq = per_layer("kvcapsule.layer_rope"), per_layer("kvcapsule.base.rope.freq_base")
    heads, d_k, d_v = (per_layer(f"kvcapsule.base.{x}") for x in ("head_count_kv", "key_length", "value_length"))
    kept, mlp = per_layer("kvcapsule.kept_count"), per_layer("kvcapsule.mlp_width")
    order = array_of(h, "kvcapsule.token_order", n_layers * n).reshape(n_layers, n)
    none = np.empty(0, np.float32)
    return Capsule(
        base=Base(
            architecture=_get(h, "kvcapsule.base.architecture"),
            block_count=_get(h, "kvcapsule.base.block_count"),
            fingerprint=_get(h, "kvcapsule.base.fingerprint"),
            rope_type=_get(h, "kvcapsule.base.rope.type"),
            rope_sections=sections,
        ),
        block_size=n,
        block_shape=_get(h, "kvcapsule.block_shape"),
        block_width=_get(h, "kvcapsule.block_width"),
        image_tokens=_get(h, "kvcapsule.image_tokens"),
        neighbour_count=_get(h, "kvcapsule.neighbour_count"),
        default_ratio=_get(h, "kvcapsule.default_ratio"),
        layers=[
            Layer(layers[i], heads[i], d_k[i], d_v[i], none, none, none, none, none, rope[i], freq[i], order[i], kept[i], mlp[i]) for i in range(n_layers)
        ],
        tiers=_tiers(h, tiers, n_layers),
        provenance={k.removeprefix("kvcapsule.train."): v.data for k, v in h.values.items() if k.startswith("kvcapsule.train.")},
    )


def _tiers(h: Header, names: list[str], n_layers: int) -> list[Tier]:
    n = len(names)
    need(2 <= n <= MAX_TIERS, f"kvcapsule.tier.name has {n} tiers, not 2..{MAX_TIERS}")
    types = len(ROW_TYPES)
    codec = array_of(h, "kvcapsule.tier.key_codec", n * n_layers).reshape(n, n_layers).tolist()
    kappa = array_of(h, "kvcapsule.tier.kappa", n * n_layers).reshape(n, n_layers).tolist()
    rows = [array_of(h, f"kvcapsule.tier.{x}_rows", n * n_layers * types).reshape(n, n_layers, types).tolist() for x in ("key", "value")]
    ratio = array_of(h, "kvcapsule.tier.ratio", n).tolist()
    return [
        Tier(names[i], codec[i], [tuple(r) for r in rows[0][i]], [tuple(r) for r in rows[1][i]], kappa[i], ratio[i]) for i in range(n)
    ]


def _tensors(header: Header, capsule: Capsule, sidecar: bool) -> None:
    """Fills in the layers' tensors; refuses any other tensor, and (in a sidecar) bytes that belong to none."""
    if sidecar:
        check_cover(header)
    expected = set()
    for layer in capsule.layers:
        for short, (kind, shape) in layer_shapes(capsule, layer).items():
            name = tensor_name(layer.index, short)
            expected.add(name)
            setattr(layer, short, read_tensor(header, name, kind, shape))
    check_names(header, expected, sidecar)


def check_names(h: Header, expected: Container[str], sidecar: bool) -> None:
    """No other tensor is there; those of an mmproj are not looked at. Raises Invalid."""
    for name in h.tensors:
        need(name in expected or not (sidecar or INFIX in name), f"unexpected tensor {name}")


def check_cover(h: Header) -> None:
    """The bytes of a sidecar are all accounted for: nothing but zeros between and behind the tensors. Raises Invalid."""
    ends = [t.offset + t.nbytes for t in h.tensors.values()]
    last = max(ends, default=h.end)
    need(last <= h.size, "the tensors reach behind the end of the file, it is incomplete")
    need(h.size <= padded(last, h.alignment), f"{h.size - last} bytes behind the last tensor belong to nothing")
    for end in (h.end, *ends):
        need(not any(h.bytes(end, padded(end, h.alignment) - end)), "the padding of the file is not zeros")

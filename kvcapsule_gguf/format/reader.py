"""Reads a capsule file and checks everything that can be checked without the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..codec.types import ROW_TYPES
from .capsule import VERSION, Base, Capsule, CapsuleError, Layer, Tier
from .gguf_header import GGUFError, Header, read_header
from .schema import INFIX, KEYS, MAX_BLOCK, MAX_FILE, MAX_KV, MAX_MLP, MAX_NEIGHBOURS, MIN_BLOCK, tensor_name, tensor_shapes
from .validate import Invalid, need, validate


def read_capsule(path: str | Path) -> Capsule:
    """A sidecar, or the capsule inside an mmproj file. Raises CapsuleError."""
    path = Path(path)
    try:
        return _read(path)
    except (GGUFError, Invalid) as e:
        raise CapsuleError(path, str(e)) from None
    except OSError as e:
        raise CapsuleError(path, f"can not be read: {e.strerror or e}") from None


def has_capsule(path: str | Path) -> bool:
    """Whether the file is a capsule, or an mmproj with one inside; False for anything else, damaged or not."""
    try:
        return "kvcapsule.version" in read_header(path, lambda key: key == "kvcapsule.version").values
    except (GGUFError, OSError):
        return False


def _read(path: Path) -> Capsule:
    header = read_header(path, lambda key: key.startswith(("kvcapsule.", "general.type", "general.architecture", "general.name", "adapter.type")))
    sidecar = "adapter.type" in header.values
    if sidecar:
        need(header.size <= MAX_FILE, f"the file has {header.size} bytes, more than 1 GiB")
        need(header.n_kv <= MAX_KV, f"{header.n_kv} keys, more than {MAX_KV}")
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "kvcapsule")):
            found = header.values.get(key)
            need(found is not None and found.data == wanted, f"not a capsule: key {key} is not '{wanted}'")
    need("kvcapsule.version" in header.values, "not a capsule: key kvcapsule.version is missing")
    version = _get(header, "kvcapsule.version")
    need(version == VERSION, f"kvcapsule.version: format version {version}, this program reads version {VERSION}: update it")
    for key in header.values:
        known = key in KEYS or key.startswith("kvcapsule.train.") or not key.startswith("kvcapsule.")
        need(known, f"unknown key {key}")
    capsule = _metadata(header)
    if sidecar:
        arch = header.values.get("general.architecture")
        need(arch is not None and arch.data == capsule.base.architecture, "general.architecture is not kvcapsule.base.architecture")
        name = header.values.get("general.name")
        capsule.name = name.data if name is not None and isinstance(name.data, str) else ""
    _tensors(header, capsule, sidecar)
    validate(capsule)
    return capsule


def _get(header: Header, key: str) -> Any:
    kind, array = KEYS[key]
    value = header.values.get(key)
    need(value is not None, f"key {key} is missing")
    wanted = f"an array of {kind}" if array else kind
    found = f"an array of {value.type}" if value.array else value.type
    need((value.type, value.array) == (kind, array), f"key {key} is {found}, not {wanted}")
    return value.data


def _array(header: Header, key: str, n: int) -> Any:
    data = _get(header, key)
    need(len(data) == n, f"key {key} has {len(data)} elements, not {n}")
    return data


def _metadata(h: Header) -> Capsule:
    """Everything but the tensors, whose sizes it bounds."""
    layers = _get(h, "kvcapsule.layers").tolist()
    tiers = _get(h, "kvcapsule.tier.name")
    n_layers, n_tiers = len(layers), len(tiers)
    n = _get(h, "kvcapsule.block_size")
    need(MIN_BLOCK <= n <= MAX_BLOCK, f"kvcapsule.block_size is {n}, not in {MIN_BLOCK}..{MAX_BLOCK}")
    neighbours = _get(h, "kvcapsule.neighbour_count")
    need(neighbours <= MAX_NEIGHBOURS, f"kvcapsule.neighbour_count is {neighbours}, more than {MAX_NEIGHBOURS}")
    need(n_layers >= 1, "kvcapsule.layers is empty")

    def per_layer(key: str) -> list[Any]:
        return _array(h, key, n_layers).tolist()

    rope, freq = per_layer("kvcapsule.layer_rope"), per_layer("kvcapsule.base.rope.freq_base")
    heads, d_k, d_v = (per_layer(f"kvcapsule.base.{x}") for x in ("head_count_kv", "key_length", "value_length"))
    kept, mlp = per_layer("kvcapsule.kept_count"), per_layer("kvcapsule.mlp_width")
    need(max(mlp) <= MAX_MLP, f"kvcapsule.mlp_width is {max(mlp)}, more than {MAX_MLP}")
    need(max(kept) < n, f"kvcapsule.kept_count is {max(kept)} in a block of {n}")
    need(neighbours > 0 or max(kept) == 0, f"kvcapsule.neighbour_count is 0, but kvcapsule.kept_count is {max(kept)}")
    order = _array(h, "kvcapsule.token_order", n_layers * n).reshape(n_layers, n)
    none = np.empty(0, np.float32)
    sections = tuple(_array(h, "kvcapsule.base.rope.sections", 4).tolist())
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
        neighbour_count=neighbours,
        default_ratio=_get(h, "kvcapsule.default_ratio"),
        layers=[
            Layer(layers[i], heads[i], d_k[i], d_v[i], none, none, none, none, none, rope[i], freq[i], order[i], kept[i], mlp[i]) for i in range(n_layers)
        ],
        tiers=_tiers(h, tiers, n_layers),
        provenance={k.removeprefix("kvcapsule.train."): v.data for k, v in h.values.items() if k.startswith("kvcapsule.train.")},
    )


def _tiers(h: Header, names: list[str], n_layers: int) -> list[Tier]:
    n = len(names)
    types = len(ROW_TYPES)
    codec = _array(h, "kvcapsule.tier.key_codec", n * n_layers).reshape(n, n_layers).tolist()
    kappa = _array(h, "kvcapsule.tier.kappa", n * n_layers).reshape(n, n_layers).tolist()
    rows = [_array(h, f"kvcapsule.tier.{x}_rows", n * n_layers * types).reshape(n, n_layers, types).tolist() for x in ("key", "value")]
    ratio = _array(h, "kvcapsule.tier.ratio", n).tolist()
    return [
        Tier(names[i], codec[i], [tuple(r) for r in rows[0][i]], [tuple(r) for r in rows[1][i]], kappa[i], ratio[i]) for i in range(n)
    ]


def _tensors(header: Header, capsule: Capsule, sidecar: bool) -> None:
    """Fills in the layers' tensors; refuses any other tensor, overlaps, and (in a sidecar) bytes that belong to none."""
    expected = set()
    for layer in capsule.layers:
        shapes = tensor_shapes(
            capsule.block_size, capsule.neighbour_count, layer.head_count_kv, layer.key_length, layer.value_length, layer.kept_count, layer.mlp_width
        )
        for short, (kind, shape) in shapes.items():
            name = tensor_name(layer.index, short)
            expected.add(name)
            info = header.tensors.get(name)
            need(info is not None, f"tensor {name} is missing")
            need(info.type_name == kind, f"tensor {name} has type {info.type_name}, not {kind}")
            ne = list(info.ne)
            while len(ne) > 1 and ne[-1] == 1:
                ne.pop()
            wanted = list(shape[::-1])
            while len(wanted) > 1 and wanted[-1] == 1:
                wanted.pop()
            need(ne == wanted, f"tensor {name} has shape {list(info.ne)}, not {list(shape[::-1])}")
            setattr(layer, short, header.read(info).reshape(shape))
    for name in header.tensors:
        need(name in expected or not (sidecar or INFIX in name), f"unexpected tensor {name}")
    if sidecar:
        _cover(header)


def _cover(header: Header) -> None:
    """The tensors lie one after the other, with nothing but alignment between them and behind the last."""
    end = header.data_start
    for info in sorted(header.tensors.values(), key=lambda t: t.offset):
        need(end <= info.offset, f"tensor {info.name} overlaps another")
        need(info.offset - end < 4096, f"{info.offset - end} bytes in front of tensor {info.name} belong to no tensor")
        end = info.offset + info.nbytes
    need(header.size - end < 4096, f"{header.size - end} bytes behind the last tensor belong to no tensor")

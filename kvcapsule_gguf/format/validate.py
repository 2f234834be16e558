"""The rules of format v1 on the contents of a capsule; the reader and the writer both apply them, so that nothing refused is ever written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from ..codec.types import ROW_TYPES, total_rows
from .capsule import BLOCK_SHAPES, GRID_ROPE_TYPES, PCA, RETAIN, ROPE_TYPES, Capsule, Layer, Tier
from .gguf_header import Header
from .schema import MAX_BLOCK, MAX_HEAD, MAX_HEADS, MAX_MEAN, MAX_MLP, MAX_NEIGHBOURS, MAX_TIERS, MAX_VALUE, MIN_BLOCK, layer_shapes, tensor_name


class Invalid(ValueError):
    """One line: key or tensor, and the reason."""


def need(ok: bool, reason: str) -> None:
    if not ok:
        raise Invalid(reason)


def read_tensor(header: Header, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of the tensor `name`, of this `shape` (numpy's order). Raises Invalid where it is missing, or of another type than `kind` or another shape."""
    info = header.tensors.get(name)
    need(info is not None, f"tensor {name} is missing")
    need(info.type_name == kind, f"tensor {name} has type {info.type_name}, not {kind}")
    ne = shape[::-1] + (1,) * (4 - len(shape))
    need(info.ne4 == ne, f"tensor {name} has shape {list(info.ne4)}, not {list(ne)}")
    return header.read(info).reshape(shape)


def validate(c: Capsule) -> None:
    """Raises Invalid."""
    validate_metadata(c)
    validate_tensors(c)


def validate_metadata(c: Capsule) -> None:
    """Everything but the tensors, whose sizes it bounds. Raises Invalid."""
    n = c.block_size
    need(MIN_BLOCK <= n <= MAX_BLOCK, f"kvcapsule.block_size is {n}, not in {MIN_BLOCK}..{MAX_BLOCK}")
    need(c.block_shape in BLOCK_SHAPES, "kvcapsule.block_shape is not raster or tile")
    if c.block_shape == "tile":
        need(c.block_width > 0 and n % c.block_width == 0, f"kvcapsule.block_width {c.block_width} does not divide block_size {n}")
    need(c.image_tokens % n == 0, f"kvcapsule.image_tokens {c.image_tokens} is not a multiple of block_size {n}")
    need(0 <= c.neighbour_count <= MAX_NEIGHBOURS, f"kvcapsule.neighbour_count is {c.neighbour_count}, more than {MAX_NEIGHBOURS}")
    need(-8 <= c.default_ratio <= 1, "kvcapsule.default_ratio is not in -8..1")
    _base(c)
    for i, layer in enumerate(c.layers):
        need(i == 0 or layer.index > c.layers[i - 1].index, "kvcapsule.layers does not ascend")
        need(layer.index < c.base.block_count, f"kvcapsule.layers names layer {layer.index} of a model of {c.base.block_count}")
        _layer(c, layer)
    need(2 <= len(c.tiers) <= MAX_TIERS, f"kvcapsule.tier.name has {len(c.tiers)} tiers, not 2..{MAX_TIERS}")
    for i, tier in enumerate(c.tiers):
        _tier(c, i, tier)
    for i, tier in enumerate(c.tiers):
        ratio = c.ratio(i)
        need(abs(ratio - tier.ratio) <= 1e-3, f"kvcapsule.tier.ratio of tier {i} is {tier.ratio:.4f}, its rows give {ratio:.4f}")
        need(i < 2 or tier.ratio >= c.tiers[i - 1].ratio, "kvcapsule.tier.ratio does not ascend")


def validate_tensors(c: Capsule) -> None:
    """Shapes and contents of the tensors. Raises Invalid."""
    for layer in c.layers:
        for short, (kind, shape) in layer_shapes(c, layer).items():
            array, name = getattr(layer, short), tensor_name(layer.index, short)
            need(array is not None, f"tensor {name} is missing")
            need(tuple(array.shape) == shape, f"tensor {name} has shape {list(array.shape[::-1])}, not {list(shape[::-1])}")
            if kind == "i32":
                need(bool(((array >= 0) & (array < layer.kept_count)).all()), f"tensor {name} points outside the {layer.kept_count} kept tokens")
            else:
                need(bool((np.abs(array) <= MAX_VALUE).all()), f"tensor {name} has values that are not finite or too large for f16")
        for short in ("k_mean", "v_mean"):
            small = np.abs(getattr(layer, short)) <= MAX_MEAN
            need(bool(small.all()), f"tensor {tensor_name(layer.index, short)} has values beyond +-{MAX_MEAN:.0f}: keys and values could overflow f16")
        for short in ("k_basis", "v_basis"):
            off = np.abs((getattr(layer, short).astype(np.float64) ** 2).sum(1) - 1) > 0.01
            need(not off.any(), f"tensor {tensor_name(layer.index, short)} has a row {off.argmax()} that is not a unit vector")
        need(bool((layer.k_query_weight >= 0).all()), f"tensor {tensor_name(layer.index, 'k_query_weight')} has negative values")


def _base(c: Capsule) -> None:
    b = c.base
    need(b.architecture != "", "kvcapsule.base.architecture is empty")
    need(b.rope_type in ROPE_TYPES, f"kvcapsule.base.rope.type is not one of {', '.join(ROPE_TYPES)}")
    grid = b.rope_type in GRID_ROPE_TYPES or (c.image_tokens > 0 and math.isqrt(c.image_tokens) ** 2 == c.image_tokens)
    need(
        c.block_shape == "raster" or grid,
        f"kvcapsule.block_shape is tile, but neither the RoPE type {b.rope_type} nor image_tokens {c.image_tokens} gives a grid",
    )
    need(re.fullmatch("[0-9a-f]{64}", b.fingerprint) is not None, "kvcapsule.base.fingerprint is not 64 hex digits")
    need(1 <= len(c.layers) <= b.block_count, f"kvcapsule.layers has {len(c.layers)} layers of a model of {b.block_count}")


def _layer(c: Capsule, layer: Layer) -> None:
    at, n = f"layer {layer.index}", c.block_size
    for key, value, most in (("head_count_kv", layer.head_count_kv, MAX_HEADS), ("key_length", layer.key_length, MAX_HEAD), ("value_length", layer.value_length, MAX_HEAD)):
        need(1 <= value <= most, f"kvcapsule.base.{key} of {at} is {value}")
    need(math.isfinite(layer.freq_base) and layer.freq_base >= 0, f"kvcapsule.base.rope.freq_base of {at} is negative or not finite")
    need(0 <= layer.kept_count < n, f"kvcapsule.kept_count of {at} is {layer.kept_count} in a block of {n}")
    need(layer.kept_count == 0 or c.neighbour_count > 0, f"kvcapsule.kept_count of {at} is {layer.kept_count} without neighbours")
    need(0 <= layer.mlp_width <= MAX_MLP, f"kvcapsule.mlp_width of {at} is {layer.mlp_width}, more than {MAX_MLP}")
    need(layer.mlp_width == 0 or layer.kept_count > 0, f"kvcapsule.mlp_width of {at} is {layer.mlp_width} without kept tokens")
    if layer.token_order is not None:
        order = np.asarray(layer.token_order)
        need(order.shape == (n,) and np.array_equal(np.sort(order), np.arange(n)), f"kvcapsule.token_order of {at} is not a permutation of 0..{n - 1}")


def _tier(c: Capsule, i: int, tier: Tier) -> None:
    need((tier.name == "faithful") == (i == 0), f"kvcapsule.tier.name of tier {i} is '{tier.name}'; tier 0, and no other, is 'faithful'")
    need(-8 <= tier.ratio <= 1, f"kvcapsule.tier.ratio of tier {i} is not in -8..1")
    for short in ("key_codec", "key_rows", "value_rows", "kappa"):
        need(len(getattr(tier, short)) == len(c.layers), f"kvcapsule.tier.{short} of tier {i} is not for {len(c.layers)} layers")
    for j, layer in enumerate(c.layers):
        at = f"of tier {i}, layer {layer.index}"
        need(tier.key_codec[j] in (PCA, RETAIN), f"kvcapsule.tier.key_codec {at} is {tier.key_codec[j]}, not 0 or 1")
        need(math.isfinite(tier.kappa[j]), f"kvcapsule.tier.kappa {at} is not finite")
        _rows(c, f"kvcapsule.tier.key_rows {at}", tier.key_rows[j], layer.key_length)
        _rows(c, f"kvcapsule.tier.value_rows {at}", tier.value_rows[j], layer.value_length)
        if tier.key_codec[j] == RETAIN:
            need(layer.kept_count > 0, f"kvcapsule.tier.key_codec {at} is retain, but the layer has no kept tokens")
            need(total_rows(tier.key_rows[j]) >= layer.kept_count, f"kvcapsule.tier.key_rows {at}: fewer rows than the {layer.kept_count} kept tokens")


def _rows(c: Capsule, what: str, counts: Sequence[int], d: int) -> None:
    need(len(counts) == len(ROW_TYPES) and min(counts) >= 0, f"{what} is not {len(ROW_TYPES)} counts")
    total = total_rows(counts)
    need(1 <= total <= c.block_size, f"{what}: {total} rows in a block of {c.block_size}")
    for row_type, n in zip(ROW_TYPES, counts, strict=True):
        need(not n or row_type.fits(d), f"{what}: type {row_type.name} does not fit head size {d}")

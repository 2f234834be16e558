"""A capsule as plain data, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..codec.types import TYPE_NAMES, rows_bytes
from ..format.capsule import CODEC_NAMES, Capsule
from ..format.tile_capsule import TileCapsule

CODECS = {number: name for name, number in CODEC_NAMES.items()}
PER_TIER_AND_LAYER = ("key_error", "value_error")


def as_json(path: Path, capsule: Capsule) -> dict[str, Any]:
    errors = {name: _table(capsule, capsule.provenance.get(name)) for name in PER_TIER_AND_LAYER}
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "name": capsule.name,
        "base": base_of(capsule),
        "block_size": capsule.block_size,
        "block_shape": capsule.block_shape,
        "block_width": capsule.block_width,
        "image_tokens": capsule.image_tokens,
        "default_preset": capsule.tiers[capsule.tier_for_ratio()].name,
        "neighbours": capsule.neighbour_count,
        "presets": [_tier(capsule, i, errors) for i in range(len(capsule.tiers))],
        "provenance": {key: plain(value) for key, value in sorted(capsule.provenance.items()) if key not in PER_TIER_AND_LAYER},
    }


def base_of(capsule: Capsule | TileCapsule) -> dict[str, Any]:
    base = capsule.base
    return {"architecture": base.architecture, "layers": base.block_count, "fingerprint": base.fingerprint, "rope": base.rope_type}


def _tier(capsule: Capsule, i: int, errors: dict[str, np.ndarray | None]) -> dict[str, Any]:
    tier, n = capsule.tiers[i], capsule.block_size
    slots = capsule.image_tokens // n
    return {
        "name": tier.name,
        "ratio": round(tier.ratio, 4),
        "times_smaller": round(1 / (1 - tier.ratio), 2) if tier.ratio < 1 else None,
        "bytes_per_token": round(capsule.slot_bytes(i) / n, 1),
        "bytes_per_slot": capsule.slot_bytes(i),
        "bytes_per_image": slots * capsule.slot_bytes(i) if slots else None,
        "bytes_per_image_f16": slots * capsule.f16_bytes() if slots else None,
        "layers": [_layer(capsule, i, j, errors) for j in range(len(capsule.layers))],
    }


def _layer(capsule: Capsule, i: int, j: int, errors: dict[str, np.ndarray | None]) -> dict[str, Any]:
    tier, layer = capsule.tiers[i], capsule.layers[j]
    out: dict[str, Any] = {
        "layer": layer.index,
        "key_codec": CODECS[tier.key_codec[j]],
        "mlp_width": layer.mlp_width,
        "key_rows": dict(zip(TYPE_NAMES, map(int, tier.key_rows[j]))),
        "value_rows": dict(zip(TYPE_NAMES, map(int, tier.value_rows[j]))),
        "key_bits": round(8 * rows_bytes(tier.key_rows[j], layer.key_length) / (capsule.block_size * layer.key_length), 3),
        "value_bits": round(8 * rows_bytes(tier.value_rows[j], layer.value_length) / (capsule.block_size * layer.value_length), 3),
        "kappa": round(tier.kappa[j], 3),
    }
    for name, table in errors.items():
        if table is not None:
            out[name] = float(table[i, j])
    return out


def _table(capsule: Capsule, values: Any) -> np.ndarray | None:
    """[tier, layer], if the file has it; another program may have written something else under this name."""
    shape = (len(capsule.tiers), len(capsule.layers))
    if not isinstance(values, (list, np.ndarray)) or np.size(values) != shape[0] * shape[1]:
        return None
    return np.asarray(values, float).reshape(shape)


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [round(float(x), 6) for x in value]
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    return value


def head_lines(data: dict[str, Any]) -> list[str]:
    """Of any format: the file, its model, its training."""
    base = data["base"]
    return [
        f"{data['file']}: {data['name'] or 'capsule'}, {data['file_bytes'] / 2**20:.2f} MiB",
        f"for: {base['architecture']}, {base['layers']} layers, RoPE {base['rope']}, fingerprint {base['fingerprint'][:16]}...",
        "trained: " + (", ".join(f"{k} {_short(v)}" for k, v in data["provenance"].items() if not isinstance(v, list)) or "nothing said"),
    ]


def text(data: dict[str, Any]) -> str:
    name_line, base_line, trained_line = head_lines(data)
    lines = [
        name_line,
        base_line,
        f"blocks: {data['block_size']} tokens, {_shape(data)}"
        + (f", {data['image_tokens']} tokens an image" if data["image_tokens"] else ", images of any size"),
        trained_line,
        "",
        f"{'preset':<12} {'ratio':>6} {'smaller':>8} {'bytes/token':>12} {'KiB/image':>10}",
    ]
    for tier in data["presets"]:
        image = f"{tier['bytes_per_image'] / 1024:.1f}" if tier["bytes_per_image"] else "-"
        mark = " (default)" if tier["name"] == data["default_preset"] else ""
        lines.append(f"{tier['name']:<12} {tier['ratio']:>6.3f} {tier['times_smaller'] or 0:>7.2f}x {tier['bytes_per_token']:>12.1f} {image:>10}{mark}")
    for tier in data["presets"]:
        lines += ["", f"{tier['name']}: rows by type, bits per value, error (of all but the mean), guard", *_layers(tier["layers"])]
    return "\n".join(lines)


def _shape(data: dict[str, Any]) -> str:
    width = data["block_width"]
    if data["block_shape"] == "tile":
        return f"tiles of {width} x {data['block_size'] // width}"
    return "raster" + (f", image {width} tokens wide" if width else "")


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'layer':>5} {'codec':<8} {'key rows':<34} {'bits':>5} {'error':>8}  {'value rows':<34} {'bits':>5} {'error':>8} {'kappa':>7}"]
    for x in layers:
        codec = x["key_codec"] + (f"+{x['mlp_width']}" if x["key_codec"] == "retain" and x["mlp_width"] else "")
        lines.append(
            f"{x['layer']:>5} {codec:<8} {_rows(x['key_rows']):<34} {x['key_bits']:>5.2f} {_error(x.get('key_error')):>8}  "
            f"{_rows(x['value_rows']):<34} {x['value_bits']:>5.2f} {_error(x.get('value_error')):>8} {x['kappa'] if x['kappa'] > 0 else 'off':>7}"
        )
    return lines


def _rows(rows: dict[str, int]) -> str:
    return " + ".join(f"{n} {name}" for name, n in rows.items() if n)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:80]

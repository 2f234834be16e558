"""A capsule as plain data, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..codec.head import F16, F32
from ..format.tile_capsule import VERSION, TileCapsule


def as_json(path: Path, capsule: TileCapsule) -> dict[str, Any]:
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "version": VERSION,
        "name": capsule.name,
        "base": base_of(capsule),
        "tiers": [_tier(capsule, t) for t in range(len(capsule.smaller))],
        "layers": [
            {"layer": x.index, "heads": len(x.k_mean), "key_length": x.k_mean.shape[1], "value_length": x.v_mean.shape[1], "rope": x.rope, "value_axes": x.v_axes is not None,
             "narrow": [] if x.narrow is None else x.narrow.tolist(), "key_energy": x.k_energy, "value_energy": x.v_energy}
            for x in capsule.layers
        ],
        "provenance": {key: plain(value) for key, value in sorted(capsule.provenance.items())},
    }  # fmt: skip


def _tier(capsule: TileCapsule, t: int) -> dict[str, Any]:
    """Bits of a value with its share of the scale, of a whole tile."""
    layers = []
    for i, x in enumerate(capsule.layers):
        bits = {kind: 8 * sum(h.size(8, 8) for h in capsule.heads(i, kind, t)) / (64 * mean.size) for kind, mean in (("k", x.k_mean), ("v", x.v_mean))}
        layers.append({"layer": x.index, "key_bits": round(bits["k"], 3), "value_bits": round(bits["v"], 3)})
    tables = np.concatenate([table[t].ravel() for x in capsule.layers for table in (x.k_table, x.v_table)])
    return {
        "times_smaller": round(capsule.smaller[t], 2),
        "ratio": round(1 - 1 / capsule.smaller[t], 4),
        "by_quality": t >= capsule.first_tier,
        "bytes_per_token": round(capsule.slot_bytes(t) / 64, 1),
        "bytes_per_tile": capsule.slot_bytes(t),
        "bytes_per_tile_f16": capsule.f16_bytes(),
        "blocks": {{F16: "f16", F32: "f32"}.get(b, f"{b} bits"): int(n) for b, n in zip(*np.unique(tables, return_counts=True))},
        "layers": layers,
    }


def base_of(capsule: TileCapsule) -> dict[str, Any]:
    base = capsule.base
    return {"architecture": base.architecture, "layers": base.block_count, "fingerprint": base.fingerprint, "rope": base.rope_type}


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [round(float(x), 6) for x in value]
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    return value


def head_lines(data: dict[str, Any]) -> list[str]:
    """The file, its model, its training."""
    base = data["base"]
    return [
        f"{data['file']}: {data['name'] or 'capsule'}, {data['file_bytes'] / 2**20:.2f} MiB",
        f"for: {base['architecture']}, {base['layers']} layers, RoPE {base['rope']}, fingerprint {base['fingerprint'][:16]}...",
        "trained: " + (", ".join(f"{k} {_short(v)}" for k, v in data["provenance"].items() if not isinstance(v, list)) or "nothing said"),
    ]


def text(data: dict[str, Any]) -> str:
    axes = sum(x["value_axes"] for x in data["layers"])
    lines = [
        *([f"the built-in capsule of {data['file']}", head_lines(data)[1]] if data.get("builtin") else head_lines(data)),
        f"tiles: 8 x 8 tokens; {len(data['layers'])} layers, {axes} of them with axes of values",
        *_narrow(data),
        "",
        f"{'smaller':>8} {'ratio':>7} {'bytes/token':>12} {'bytes/tile':>11} {'KiB of 256 tokens':>18}  blocks by bits (*: --ratio alone takes it)",
    ]
    for tier in data["tiers"]:
        blocks = ", ".join(f"{n} {name}" for name, n in tier["blocks"].items())
        mark = " " if tier["by_quality"] else "*"
        lines.append(f"{tier['times_smaller']:>7.2f}x{mark}{tier['ratio']:>7.3f} {tier['bytes_per_token']:>12.1f} {tier['bytes_per_tile']:>11} {4 * tier['bytes_per_tile'] / 1024:>18.1f}  {blocks}")
    lines += ["", "bits of a key (K) and of a value (V), by layer, for each tier", "layer " + " ".join(f"{tier['times_smaller']:>10.2f}x" for tier in data["tiers"])]
    for i, x in enumerate(data["layers"]):
        each = [tier["layers"][i] for tier in data["tiers"]]
        lines.append(f"{x['layer']:>5} " + " ".join(f"{e['key_bits']:>5.2f} {e['value_bits']:>5.2f}" for e in each))
    return "\n".join(lines)


def _narrow(data: dict[str, Any]) -> list[str]:
    heads = sum(x["heads"] for x in data["layers"])
    named = sum(sum(x["narrow"]) for x in data["layers"])
    whole = sum(sum(x["narrow"]) == x["heads"] for x in data["layers"])
    return [f"--image-attention auto: {named} of {heads} KV heads see no other picture while a picture is read; in {whole} layers all of them"] if named else []


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:80]

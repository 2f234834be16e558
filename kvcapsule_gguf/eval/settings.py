"""The caches that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..format.base_model import BaseModel
    from ..format.capsule import Capsule

BITS = {"f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
VISION_ONLY = ("q8_0", "q4_0")
TYPES = {"f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8}


@dataclass(frozen=True)
class Setting:
    """One way to keep the picture. The first of a list is the reference: an f16 cache."""

    name: str
    cache: str = "f16"  # type of K and V; the quantized ones are rotated by llama.cpp itself
    capsule: Path | None = None
    ratio: float = 0.0  # of the capsule, 0 = its default
    guard: bool = True
    vision: str = ""  # type of the vision cells alone, the text stays in f16
    drop: float = 0.0  # share of the vision tokens that is removed, evenly spread


def rivals(names: list[str]) -> list[Setting]:
    """f16, a quantized cache of all cells, the same of the vision cells alone ("q4_0-vision"), or "drop" and a share ("drop0.6")."""
    out = []
    for name in names:
        if name in BITS:
            out.append(Setting(name, cache=name))
        elif name.removesuffix("-vision") in VISION_ONLY and name.endswith("-vision"):
            out.append(Setting(name, vision=name.removesuffix("-vision")))
        elif name.startswith("drop"):
            out.append(Setting(name, drop=float(name.removeprefix("drop"))))
        else:
            raise ValueError(f"--against {name}: one of {', '.join(BITS)}, {', '.join(f'{t}-vision' for t in VISION_ONLY)} or drop0.6")
    return out


def plain_capsule(base: BaseModel, kind: str, block_size: int) -> Capsule:
    """Stores every vision token as it is, in rotated rows of type `kind`: what a quantized cache would do to the vision cells alone.

    Keys are quantized without RoPE; llama.cpp quantizes them with it, which is the same error on average.
    """
    from ..codec.types import legal, row_counts
    from ..format.base_model import base_of
    from ..format.capsule import PCA, Capsule, Layer, Tier

    eye = np.eye(block_size, dtype=np.float32)
    layers = []
    for i in base.kv_layers:
        heads, d_k, d_v = base.head_count_kv[i], base.key_length[i], base.value_length[i]
        zero_k, zero_v, one = np.zeros((heads, d_k), np.float32), np.zeros((heads, d_v), np.float32), np.ones((heads, d_k), np.float32)
        layers.append(Layer(i, heads, d_k, d_v, zero_k, zero_v, eye, eye, one, rope=base.layer_rope[i], freq_base=base.freq_base[i]))
    rows = row_counts(**{kind: block_size})
    keys, values = [legal(rows, x.key_length) for x in layers], [legal(rows, x.value_length) for x in layers]
    tiers = [Tier(name, [PCA] * len(layers), keys, values, [0.0] * len(layers)) for name in ("faithful", kind)]
    return Capsule(base_of(base), block_size, layers, tiers, default_ratio=0.5)


def capsules(path: Path, ratios: list[float], guards: tuple[bool, ...] = (True,)) -> list[Setting]:
    """A capsule at its presets nearest to the ratios, named by its key codec. Raises ValueError for a file that is no capsule."""
    from ..format.reader import read_capsule

    content = read_capsule(path)
    out: dict[str, Setting] = {}
    for ratio in ratios:
        tier = min(content.tiers[1:], key=lambda t: abs(t.ratio - ratio))
        for guard in guards:
            name = f"{_codec(content, tier)} {tier.ratio:.2f}" + ("" if guard else ", no guard")
            out.setdefault(name, Setting(name, capsule=path, ratio=tier.ratio, guard=guard))
    return list(out.values())


def _codec(content: Any, tier: Any) -> str:
    retain = [bool(codec) for codec in tier.key_codec]
    name = "retain" if all(retain) else "mixed" if any(retain) else "pca"
    return name + ("+MLP" if any(retain) and any(layer.mlp_width for layer in content.layers) else "")


def dropped(n: int, share: float) -> list[tuple[int, int]]:
    """Ranges [a, b) of n tokens to remove so that the others are evenly spread. The last one stays: text must follow it without a gap."""
    keep = max(1, round(n * (1 - share)))
    kept = {(i + 1) * n // keep - 1 for i in range(keep)}
    out: list[tuple[int, int]] = []
    for i in range(n):
        if i not in kept:
            if out and out[-1][1] == i:
                out[-1] = (out[-1][0], i + 1)
            else:
                out.append((i, i + 1))
    return out

"""The caches that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BITS = {"f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
TYPES = {"f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8}


@dataclass(frozen=True)
class Setting:
    """One way to keep the picture. The first of a list is the reference: an f16 cache."""

    name: str
    cache: str = "f16"  # type of K and V; the quantized ones are rotated by llama.cpp itself
    capsule: Path | None = None
    ratio: float = 0.0  # of the capsule, 0 = its default
    guard: bool = True
    drop: float = 0.0  # share of the vision tokens that is removed, evenly spread


def rivals(names: list[str]) -> list[Setting]:
    """f16, a quantized cache, or "drop" and a share ("drop0.6")."""
    out = []
    for name in names:
        if name in BITS:
            out.append(Setting(name, cache=name))
        elif name.startswith("drop"):
            out.append(Setting(name, drop=float(name.removeprefix("drop"))))
        else:
            raise ValueError(f"--against {name}: one of {', '.join(BITS)} or drop0.6")
    return out


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

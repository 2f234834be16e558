"""The caches that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..chat.files import BUILT_IN
from ..format.tile_capsule import read_tile_capsule
from ..runtime.errors import InputError

BITS = {"f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "iq4_nl": 4.5}
VISION = "-vision"
DROP = "drop"


@dataclass(frozen=True)
class Setting:
    """One way to keep the picture. The first of a list is the reference: an f16 cache."""

    name: str
    k: str = "f16"  # type of the keys; llama.cpp rotates what it quantizes
    v: str = "f16"
    vision: bool = False  # only the vision cells have these types, the text stays in f16
    capsule: Path | None = None  # a file, or built-in
    quality: float = 0.0  # of the capsule, 0 = its default
    ratio: float = 0.0  # in its place
    drop: float = 0.0  # share of the vision tokens that is removed, evenly spread
    image_attention: str = "full"  # of the capsule: auto, or for training measure
    uncompressed: bool = False  # the capsule is there for its heads alone
    floor: bool = False  # flash attention on where the others have it off, or the other way round

    @property
    def f16_cells(self) -> bool:
        """A picture that was just decoded lies in the cells of the reference."""
        return not self.floor and (self.vision or self.k == self.v == "f16")

    def bytes_per_token(self, shapes: Sequence[tuple[int, int, int]]) -> float:
        """shapes: (KV heads, key length, value length) of each layer."""
        return sum(n * (d_k * BITS[self.k] + d_v * BITS[self.v]) for n, d_k, d_v in shapes) / 8


# the same f16 cache, attention summed in another order: a KLD of this size is rounding
FLOOR = Setting("floor", floor=True)


def rivals(names: list[str]) -> list[Setting]:
    """A type ("q4_0"), two types for keys and values ("q8_0+q4_0"), either for the vision cells alone ("q4_0-vision"), or "drop" and a share ("drop0.6").

    Raises InputError."""
    return [_rival(name) for name in names]


def _rival(name: str) -> Setting:
    k, plus, v = name.removesuffix(VISION).partition("+")
    if k in BITS and (v in BITS or not plus):
        return Setting(name, k, v or k, vision=name.endswith(VISION))
    try:
        if name.startswith(DROP) and 0 <= (share := float(name.removeprefix(DROP))) < 1:
            return Setting(name, drop=share)
    except ValueError:
        pass
    raise InputError(f"--against {name}: a type of {', '.join(BITS)}, two such as q8_0+q4_0, either with {VISION} behind it, or drop0.6")


def capsules(path: Path, qualities: list[float], ratios: list[float], narrow: bool = False) -> list[Setting]:
    """A capsule at these qualities (none and no ratios: its default), and at the tiers nearest to the ratios; narrow: with its image attention as well,
    and that without compression. Raises CapsuleError."""
    kind = BUILT_IN if str(path) == BUILT_IN else "capsule"
    if kind == "capsule":
        read_tile_capsule(path)  # before a model is loaded
    found = [Setting(f"{kind}, quality {q:g}" if q else kind, capsule=path, quality=q) for q in qualities or ([] if ratios else [0.0])]
    found += [Setting(f"{kind} at {ratio:g}", capsule=path, ratio=ratio) for ratio in ratios]
    if narrow:
        found += [replace(s, name=f"{s.name}, narrowed", image_attention="auto") for s in found]
        found.append(Setting("f16, narrowed", capsule=path, image_attention="auto", uncompressed=True))
    return found


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

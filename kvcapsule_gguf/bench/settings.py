"""The caches that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from ..train.trainer import TrainOptions

BUILTIN = "built-in"


@dataclass(frozen=True)
class Setting:
    """cache: type of the hot cache; capsule: codec that images are compressed with, BUILTIN: the built-in capsule (format v2), "" = none; ratio: share to save, 0 = by default;
    neighbours, mlp_width: of `retain`; hot: only one image is, the others stay hot: our kernel on an uncompressed cache."""

    name: str
    flash: bool = True
    cache: str = "f16"
    capsule: str = ""
    ratio: float = 0.0
    neighbours: int = TrainOptions.neighbours
    mlp_width: int = TrainOptions.mlp_width
    hot: bool = False


SETTINGS = {
    s.name: s
    for s in (
        Setting("f16 FA"),
        Setting("f16 no FA", flash=False),
        Setting("q8_0 FA", cache="q8_0"),
        Setting("q4_0 FA", cache="q4_0"),
        Setting("own f16", capsule="retain", hot=True),
        Setting("own q8_0", cache="q8_0", capsule="retain", hot=True),
        Setting("pca", capsule="pca"),
        Setting("pca q8_0", cache="q8_0", capsule="pca"),
        Setting("retain", capsule="retain"),
        Setting("retain 2", capsule="retain", neighbours=2),
        Setting("built-in", capsule=BUILTIN, ratio=0.8),
        Setting("built-in hot", capsule=BUILTIN, ratio=0.8, hot=True),
        *(Setting(f"retain MLP {h}", capsule="retain", mlp_width=h) for h in (8, 16, 32)),
    )
}

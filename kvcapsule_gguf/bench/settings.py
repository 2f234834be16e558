"""The caches that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """cache: type of the hot cache, of keys and of values (values: that of keys); capsule: images are compressed with the built-in capsule at `ratio`, the share to save;
    hot: only one image is, the others stay hot: our kernel on an uncompressed cache."""

    name: str
    flash: bool = True
    cache: str = "f16"
    values: str = ""
    capsule: bool = False
    ratio: float = 0.8
    hot: bool = False

    @property
    def cache_v(self) -> str:
        return self.values or self.cache


SETTINGS = {
    s.name: s
    for s in (
        Setting("f16 FA"),
        Setting("f16 no FA", flash=False),
        Setting("q8_0 FA", cache="q8_0"),
        Setting("q8_0+q4_0 FA", cache="q8_0", values="q4_0"),
        Setting("q4_0 FA", cache="q4_0"),
        Setting("capsule", capsule=True),
        Setting("capsule 2.5x", capsule=True, ratio=0.6),
        Setting("capsule q8_0", cache="q8_0", capsule=True),
        Setting("own f16", capsule=True, hot=True),
        Setting("own q8_0", cache="q8_0", capsule=True, hot=True),
    )
}

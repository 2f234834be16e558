"""The caches that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """cache: type of the hot cache, of keys and of values (values: that of keys); capsule: images are compressed with the built-in capsule at `ratio`, the share to save;
    hot: only one image is, the others stay hot: our kernel on an uncompressed cache; ik: ik_llama.cpp's cache, of as many text tokens."""

    name: str
    flash: bool = True
    cache: str = "f16"
    values: str = ""
    capsule: bool = False
    ratio: float = 0.8
    hot: bool = False
    ik: bool = False

    @property
    def stock(self) -> bool:
        """One of llama.cpp's own caches."""
        return not (self.capsule or self.ik)

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
        Setting("ik f16", ik=True),
        Setting("ik q8_0", cache="q8_0", ik=True),
        Setting("ik q8_0+q4_0", cache="q8_0", values="q4_0", ik=True),
        Setting("ik q4_0", cache="q4_0", ik=True),
    )
}

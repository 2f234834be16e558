"""What the cache holds, in tokens and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .. import native
from .args import CACHE_TYPES
from .engine import Engine

BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "iq4_nl": 4.5}
assert BITS.keys() == CACHE_TYPES.keys()


@dataclass
class ImageUse:
    """One picture of the conversation. first: its place among the items of the cache; tokens: cells before compression; moved: those in slots now;
    slots: how many of each tier."""

    name: str
    first: int = 0
    tokens: int = 0
    moved: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    bytes_f16: int = 0
    bytes_now: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "tokens": self.tokens,
            "tokens_compressed": self.moved,
            "slots": self.slots,
            "kv_bytes_f16_equivalent": self.bytes_f16,
            "kv_bytes": self.bytes_now,
        }

    @classmethod
    def from_json(cls, value: dict) -> ImageUse:
        """The opposite of as_json() with `first` added. Raises KeyError, TypeError, ValueError: it comes from a file."""
        names = ("first", "tokens", "tokens_compressed", "kv_bytes_f16_equivalent", "kv_bytes")
        first, tokens, moved, f16, now = (value[name] for name in names)
        slots = {str(name): n for name, n in dict(value["slots"]).items()}
        if not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in (first, tokens, moved, f16, now, *slots.values())):
            raise ValueError("not the numbers of a picture")
        return cls(str(value["name"]), first, tokens, moved, slots, f16, now)


@dataclass(frozen=True)
class CacheUse:
    """Bytes of K and V, all layers. `vision_*` is the pictures' part."""

    vision_tokens: int
    bytes_f16: int
    bytes_now: int
    bytes_allocated: int
    bytes_scratch: int
    bytes_cell: int
    slots: dict[str, int]  # of each tier
    n_hot: int
    n_hot_used: int

    @property
    def ratio(self) -> float:
        """Share of the pictures' f16 cache that is saved, like --ratio but measured."""
        return 1 - self.bytes_now / self.bytes_f16 if self.bytes_f16 else 0.0


def cache_use(engine: Engine, images: list[ImageUse], cells: int) -> CacheUse:
    """cells: tokens in the context."""
    if engine.capsule is not None:
        s = native.stats(engine.ctx)
        cell = s.bytes_hot // s.n_hot if s.n_hot else 0
        return CacheUse(s.vision_tokens, s.kv_bytes_f16, s.kv_bytes, s.bytes_allocated, s.bytes_scratch, cell, s.slots, s.n_hot, s.n_hot_used)
    tokens = sum(image.tokens for image in images)
    f16, cell = plain_bytes(engine)
    return CacheUse(tokens, tokens * f16, tokens * cell, engine.n_ctx * cell, 0, cell, {}, engine.n_ctx, cells)


def plain_bytes(engine: Engine) -> tuple[int, int]:
    """K and V of one token in f16, and in the types of this cache, without a capsule; from the metadata, exact for full-attention models."""
    k = sum(n * d_k for n, d_k, _ in native.layer_shapes(engine.model))
    v = sum(n * d_v for n, _, d_v in native.layer_shapes(engine.model))
    options = engine.options
    return 2 * (k + v), int((k * BITS[options.cache_type_k] + v * BITS[options.cache_type_v]) / 8)


def break_even(use: CacheUse, images: list[ImageUse]) -> int | None:
    """How many pictures like these pay for the hot cells one of them needs while it is read, and for the scratch; None if none would."""
    done = [image for image in images if image.moved]
    if not done:
        return None
    saved = sum(image.bytes_f16 - image.bytes_now for image in done) / len(done)
    overhead = max(image.tokens for image in done) * use.bytes_cell + use.bytes_scratch
    return math.ceil(overhead / saved) if saved > 0 else None


def table(engine: Engine, images: list[ImageUse], cells: int, taken_back: int | None = None) -> str:
    """For /stats: a line per picture, the totals, the break-even. taken_back: so many of the last pictures, and text, are in the cache but in the
    conversation no more; None: nothing is."""
    use = cache_use(engine, images, cells)
    back = len(images) - (taken_back or 0)
    names = [image.name + " (taken back)" * (n >= back) for n, image in enumerate(images)]
    width = max([*map(len, names), 7])
    tiers = [name for name in use.slots if use.slots[name] or any(image.slots.get(name) for image in images)]
    lines = [f"{'picture':<{width}}  tokens  {''.join(f'{name:>8}  ' for name in tiers)}MiB before  MiB now"]
    rows = [(name, i.tokens, i.slots, i.bytes_f16, i.bytes_now) for name, i in zip(names, images)]
    rows.append(("total", use.vision_tokens, use.slots, use.bytes_f16, use.bytes_now))
    for name, tokens, slots, before, now in rows:
        lines.append(f"{name:<{width}}  {tokens:>6}  {''.join(f'{slots.get(tier, 0):>8}  ' for tier in tiers)}{mib(before):>10}  {mib(now):>7}")
    lines.append(f"context: {cells} of {engine.n_ctx} tokens; hot cache: {use.n_hot_used} of {use.n_hot} cells; allocated: {mib(use.bytes_allocated)} MiB")
    if taken_back is not None:
        lines.append("what /undo took back is counted, since the next question may use it again; what it does not use is dropped then")
    if engine.capsule is None:
        lines.append("no capsule: nothing is compressed")
    elif (count := break_even(use, images)) is not None:
        lines.append(f"memory breaks even at {count} picture{'s' if count != 1 else ''}")
    if engine.capsule is not None and (s := native.stats(engine.ctx)).n_heads_narrow:
        lines.append(f"{s.n_heads_narrow} of {s.n_heads} KV heads see no other picture while a picture is read; {s.n_tokens_narrow} vision tokens were read so")
    return "\n".join(lines)


def mib(size: int) -> str:
    return f"{size / 2**20:.3f}" if size < 10 * 2**20 else f"{size / 2**20:.1f}"

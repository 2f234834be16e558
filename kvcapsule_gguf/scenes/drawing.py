"""Drawing of scenes with Pillow: smooth edges, textured backgrounds, everything decided by the seed."""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .layout import COLOURS, SIDE, Item, Scene

_OVERSAMPLE = 3


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _resize(field: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(field.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Textured backdrop of moderate contrast, float32 [side, side, 3] around mid grey."""
    tint = rng.uniform(-14, 14, 3)
    base = rng.uniform(92, 160)
    waves = _resize(rng.normal(0, 1, (int(rng.integers(3, 8)),) * 2), side) * rng.uniform(4, 16)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) * (SIDE / side)
    angle, period = rng.uniform(0, pi), rng.uniform(9, 40)
    along = (x * cos(angle) + y * sin(angle)) * (2 * pi / period)
    across = (y * cos(angle) - x * sin(angle)) * (2 * pi / period)
    texture = rng.integers(5)
    strength = rng.uniform(4, 15)
    if texture == 0:
        pattern = np.sin(along)
    elif texture == 1:
        pattern = np.sign(np.sin(along) * np.sin(across))
    elif texture == 2:
        pattern = ((np.cos(along) * np.cos(across)) > 0.5) * 2.0 - 0.5
    elif texture == 3:
        pattern = _resize(rng.normal(0, 1, (int(rng.integers(20, 70)),) * 2), side)
    else:
        pattern = np.zeros_like(x)
    grain = rng.standard_normal((side, side, 1), dtype=np.float32) * np.float32(rng.uniform(1, 7))
    flat = base + waves + pattern * strength
    return flat[..., None].astype(np.float32) + tint.astype(np.float32) + grain


def _shape_mask(draw: ImageDraw.ImageDraw, kind: str, c: float, r: float) -> None:
    if kind == "circle":
        draw.ellipse([c - r, c - r, c + r, c + r], fill=255)
    elif kind == "ring":
        draw.ellipse([c - r, c - r, c + r, c + r], outline=255, width=max(3, round(r * 0.36)))
    elif kind == "square":
        draw.rectangle([c - r * 0.9, c - r * 0.9, c + r * 0.9, c + r * 0.9], fill=255)
    elif kind == "triangle":
        draw.polygon([(c, c - r), (c - r, c + r * 0.9), (c + r, c + r * 0.9)], fill=255)
    elif kind == "cross":
        draw.rectangle([c - r, c - r * 0.3, c + r, c + r * 0.3], fill=255)
        draw.rectangle([c - r * 0.3, c - r, c + r * 0.3, c + r], fill=255)
    elif kind == "star":
        spokes = [(r if i % 2 == 0 else r * 0.42, pi / 2 + i * pi / 5) for i in range(10)]
        draw.polygon([(c + d * cos(a), c - d * sin(a)) for d, a in spokes], fill=255)


def word_font_size(text: str, radius: float) -> float:
    """Font size, in pixels of a 336 picture, at which a word is 2 * radius wide (at most 58)."""
    return min(58.0, 100.0 * 2 * radius / max(1.0, _font(100).getlength(text)))


def letter_spans(item: Item) -> list[tuple[float, float]]:
    """Left and right edge of each letter of a word, in pixels of a 336 picture."""
    size = word_font_size(item.text, item.radius)
    ends = [_font(100).getlength(item.text[:i]) * size / 100 for i in range(len(item.text) + 1)]
    left = item.x - ends[-1] / 2
    return [(left + a, left + b) for a, b in zip(ends, ends[1:])]


def _item_mask(item: Item, scale: float) -> Image.Image:
    """Coverage of an item on a square tile of even side, centred on the item."""
    half = int(np.ceil((item.radius + 6) * scale)) + 1
    big = half * 2 * _OVERSAMPLE
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    zoom = scale * _OVERSAMPLE
    if item.kind in ("digit", "word"):
        size = item.radius * 2.5 if item.kind == "digit" else word_font_size(item.text, item.radius)
        stroke = max(1, round(size * zoom * 0.028))
        draw.text((big / 2, big / 2), item.text, fill=255, font=_font(round(size * zoom)), anchor="mm",
                  stroke_width=stroke, stroke_fill=255)
    else:
        _shape_mask(draw, item.kind, big / 2, item.radius * zoom)
    return mask.reduce(_OVERSAMPLE)


def draw_scene(scene: Scene, size: int | tuple[int, int] = SIDE) -> Image.Image:
    """RGB picture of a scene, side x side pixels or width x height: places stretch with it, items grow with the shorter side."""
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng([scene.seed, 2])
    field = background(rng, max(width, height))[:height, :width]
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    scale = min(width, height) / SIDE
    for item in scene.items:
        colour = np.array(COLOURS[item.colour]) + rng.integers(-10, 11, 3)
        mask = _item_mask(item, scale)
        corner = (round(item.x * (width / SIDE) - mask.width / 2), round(item.y * (height / SIDE) - mask.height / 2))
        image.paste(tuple(int(c) for c in colour.clip(0, 255)), (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return image

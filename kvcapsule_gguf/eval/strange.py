"""Scenes drawn in another hand: other backgrounds (photograph-like textures among them), fonts, sizes, slants and places within the cells.

What is asked and answered is the same. Nothing here is used by any training.
"""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..scenes.layout import COLOURS, SIDE, Item, Scene

BIG = 3  # items are drawn so much larger, then reduced


def draw_strange(scene: Scene) -> Image.Image:
    """RGB, 336 x 336, decided by the seed."""
    rng = np.random.default_rng([scene.seed, 40])
    backgrounds = (_photograph, _photograph, _checkers, _noise, _paper, _night)
    field = backgrounds[rng.integers(len(backgrounds))](rng)
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    font = int(rng.integers(3))  # of the whole picture, as pictures have
    for item in scene.items:
        mask = _mask(item, font, rng)
        x, y = (item.x + rng.uniform(-12, 12), item.y + rng.uniform(-12, 12)) if item.kind != "word" else (item.x, item.y + rng.uniform(-14, 14))
        corner = (round(x - mask.width / 2), round(y - mask.height / 2))
        colour = np.array(COLOURS[item.colour]) + rng.integers(-22, 23, 3)
        if rng.random() < 0.3:  # a shadow
            shade = mask.point(lambda v: v // 2)
            image.paste((0, 0, 0), (corner[0] + 4, corner[1] + 4), shade)
        image.paste(tuple(int(c) for c in colour.clip(0, 255)), corner, mask)
    if rng.random() < 0.2:
        image = Image.fromarray((np.asarray(image) * rng.uniform(0.6, 0.85) + rng.uniform(0, 50)).clip(0, 255).astype(np.uint8))
    return image


# --- backgrounds, f32 [SIDE, SIDE, 3] ---


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """Amplitudes that fall with the frequency, as those of photographs do, lit from one side, with an out-of-focus blob or two."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij"))
    fall = 1 / np.maximum(frequency, 1 / SIDE) ** rng.uniform(1.0, 1.7)
    shape = (3, *frequency.shape)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * fall
    planes = np.fft.irfft2(spectrum, (SIDE, SIDE))
    planes /= planes.std((1, 2), keepdims=True)
    shared = rng.uniform(0.4, 0.9)  # colours of photographs vary together
    planes = shared * planes.mean(0) * 3**0.5 + (1 - shared) * planes
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle = rng.uniform(0, 2 * pi)
    light = 1 + 0.5 * (x * cos(angle) + y * sin(angle))
    for _ in range(int(rng.integers(0, 3))):
        cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.1, 0.4)
        light += rng.uniform(-0.4, 0.4) / (1 + np.exp((np.hypot(x - cx, y - cy) - r) * 40))
    field = (rng.uniform(80, 160, 3) + planes.transpose(1, 2, 0) * rng.uniform(18, 42)) * light[..., None]
    return field.astype(np.float32)


def _checkers(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] // int(rng.integers(6, 40))
    return np.where(((x + y) % 2)[..., None], rng.uniform(60, 200, 3), rng.uniform(60, 200, 3))


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(70, 180, 3) + rng.standard_normal((SIDE, SIDE, 3)) * rng.uniform(20, 60)


def _paper(rng: np.random.Generator) -> np.ndarray:
    """Light, with ruled lines."""
    field = np.full((SIDE, SIDE, 3), 1.0) * rng.uniform(205, 225, 3)
    field[:: int(rng.integers(12, 30))] -= 60
    return field


def _night(rng: np.random.Generator) -> np.ndarray:
    """Dark, with a gradient and stars."""
    y = np.linspace(0, 1, SIDE)[:, None, None]
    field = rng.uniform(25, 60, 3) * (1 - y) + rng.uniform(40, 90, 3) * y + np.zeros((SIDE, SIDE, 3))
    field[rng.random((SIDE, SIDE)) < 0.004] = 200
    return field


# --- items ---


def _mask(item: Item, font: int, rng: np.random.Generator) -> Image.Image:
    """Coverage: a tile with the item in its middle, of another size and slant than in training."""
    r = item.radius * rng.uniform(0.8, 1.15) if item.kind != "word" else item.radius * rng.uniform(0.85, 1.0)
    tile = 2 * int((r + 8) * BIG)
    mask = Image.new("L", (tile, tile), 0)
    if item.kind in ("digit", "word"):
        _text(mask, item, r * BIG, font)
    else:
        _outline(ImageDraw.Draw(mask), item.kind, tile / 2, r * BIG)
    turned = mask.rotate(rng.uniform(-14, 14) if item.kind != "word" else rng.uniform(-6, 6), Image.Resampling.BICUBIC)
    return turned.resize((tile // BIG, tile // BIG), Image.Resampling.LANCZOS)


def _text(mask: Image.Image, item: Item, r: float, font: int) -> None:
    """Font 0: Pillow's bitmap font, 1: slanted, 2: an outline."""
    small = ImageFont.load_default_imagefont() if font == 0 else ImageFont.load_default(size=60)
    left, top, right, bottom = small.getbbox(item.text)
    glyphs = Image.new("L", (round(right - left) + 16, round(bottom - top) + 16), 0)
    pen = ImageDraw.Draw(glyphs)
    at = (8 - left, 8 - top)
    if font == 2:
        pen.text(at, item.text, fill=90, font=small, stroke_width=4, stroke_fill=255)
    else:
        pen.text(at, item.text, fill=255, font=small, stroke_width=2 if font == 1 else 0, stroke_fill=255)
    if font == 1:
        glyphs = glyphs.transform(glyphs.size, Image.Transform.AFFINE, (1, 0.25, -0.125 * glyphs.height, 0, 1, 0), Image.Resampling.BICUBIC)
    box = glyphs.getbbox()
    glyphs = glyphs.crop(box) if box else glyphs
    zoom = 2 * r / (glyphs.width if item.kind == "word" else glyphs.height)
    zoom = min(zoom, 2.2 * r / glyphs.width, 1.6 * r / glyphs.height if item.kind == "word" else zoom)
    glyphs = glyphs.resize((max(1, round(glyphs.width * zoom)), max(1, round(glyphs.height * zoom))), Image.Resampling.NEAREST if font == 0 else Image.Resampling.BICUBIC)
    mask.paste(glyphs, ((mask.width - glyphs.width) // 2, (mask.height - glyphs.height) // 2))


def _outline(pen: ImageDraw.ImageDraw, kind: str, c: float, r: float) -> None:
    """The same kinds in other proportions: thin rings, slim crosses, sharp stars."""
    if kind in ("circle", "ring"):
        box = [c - r, c - r, c + r, c + r]
        if kind == "ring":
            pen.ellipse(box, outline=255, width=max(3, round(r * 0.26)))
        else:
            pen.ellipse(box, fill=255)
    elif kind == "square":
        pen.rectangle([c - r * 0.8, c - r * 0.8, c + r * 0.8, c + r * 0.8], fill=255)
    elif kind == "triangle":
        pen.polygon([(c, c - r), (c - r * 0.87, c + r * 0.5), (c + r * 0.87, c + r * 0.5)], fill=255)
    elif kind == "cross":
        for w, h in ((r, r * 0.22), (r * 0.22, r)):
            pen.rectangle([c - w, c - h, c + w, c + h], fill=255)
    elif kind == "star":
        spokes = [(r if i % 2 == 0 else r * 0.36, pi / 2 + i * pi / 5) for i in range(10)]
        pen.polygon([(c + d * cos(a), c - d * sin(a)) for d, a in spokes], fill=255)

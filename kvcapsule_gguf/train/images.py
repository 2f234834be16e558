"""A varied set of drawn pictures to train on: scenes, text pages, textures, noise, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..eval.pictures import Picture
from ..scenes import CALIBRATION, WORDS, Scene, draw_scene, make_questions, make_scene

# width : height of the drawn pictures; fixed-grid models make them all square
SHAPES = ((336, 336), (336, 336), (448, 336), (336, 448))
SIDES = (252, 560)  # where the grid follows the picture: width and height lie between these


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures; half are scenes, with questions about them, the other half are unlike scenes."""

    count: int
    seed: int
    any_size: bool = False

    @property
    def identity(self) -> str:
        return f"drawn, any size: {self.any_size}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Picture:
        if not 0 <= i < self.count:
            raise IndexError(i)
        rng, name = np.random.default_rng([self.seed, i]), f"drawn picture {i + 1}"
        width, height = map(int, rng.integers(*SIDES, 2, endpoint=True)) if self.any_size else SHAPES[rng.integers(len(SHAPES))]
        size = width, height
        if i % 2 == 0:
            scene = _make_scene(rng)
            return Picture(draw_scene(scene).resize(size, Image.Resampling.BICUBIC), tuple(q.prompt for q in make_questions(scene, 5)), name)
        return Picture((_page, _texture, _collage)[i // 2 % 3](rng, size), name=name)


def _make_scene(rng: np.random.Generator) -> Scene:
    return make_scene(CALIBRATION[int(rng.integers(len(CALIBRATION)))], dense=bool(rng.random() < 0.2))


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return draw_scene(_make_scene(rng)).resize(size, Image.Resampling.BICUBIC)


def _page(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A page of words, dark on light or the other way round."""
    paper = int(rng.integers(200, 256))
    ink = int(rng.integers(0, 80))
    if rng.random() < 0.25:
        paper, ink = ink, paper
    image = Image.new("RGB", size, (paper,) * 3)
    draw = ImageDraw.Draw(image)
    height = int(rng.integers(9, 26))
    font = ImageFont.load_default(size=height)
    y = int(rng.integers(4, 24))
    while y < size[1] - height:
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), 14)]
        text = " ".join(w if rng.random() < 0.5 else w.lower() for w in words)
        if rng.random() < 0.85:
            draw.text((8, y), text, fill=(ink,) * 3, font=font)
        y += round(height * 1.4)
    return image


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC if rng.random() < 0.6 else Image.Resampling.NEAREST), dtype=np.float32)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise of several scales, as in clouds, plus stripes or a gradient."""
    field = sum(_noise(rng, size, int(cells)) * weight for cells, weight in zip(2 ** rng.integers(1, 8, 3), rng.dirichlet(np.ones(3))))
    y, x = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 120)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[..., None] * rng.uniform(0, 90)
    gradient = (x / size[0])[..., None] * rng.uniform(-100, 100, 3)
    return Image.fromarray(np.clip(field + stripes + gradient, 0, 255).astype(np.uint8))


def _collage(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Rectangles and ellipses of other pictures on a plain colour."""
    image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 256, 3)))
    for _ in range(int(rng.integers(1, 7))):
        part = (_scene, _page, _texture)[rng.integers(3)](rng, size)
        w, h = (int(rng.integers(s // 6, s)) for s in size)
        x, y = int(rng.integers(0, size[0] - w + 1)), int(rng.integers(0, size[1] - h + 1))
        mask = Image.new("L", (w, h), 255 if rng.random() < 0.6 else 0)
        ImageDraw.Draw(mask).ellipse([0, 0, w - 1, h - 1], fill=255)
        image.paste(part.resize((w, h)), (x, y), mask)
    return image

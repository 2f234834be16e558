"""Pictures with what is in them: composites of named things, rendered words, pages. Everything follows from the number of a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import things
from .things import Thing

SIZE = 224  # pixels a side
GRID = 16  # patches a side


@dataclass(frozen=True)
class Placed:
    """A thing with its centre, as shares of the width and height."""

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True)
class Picture:
    """kind: things, words or page. labels: [GRID, GRID], the number of the thing that a patch shows, or -1."""

    kind: str
    image: Image.Image
    placed: list[Placed] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Sources:
    """Where the unpacked packages lie."""

    root: Path

    @property
    def stamps(self) -> list[Thing]:
        return things.stamps(self.root / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps")

    def background(self, rng: np.random.Generator, held: bool) -> Image.Image:
        """A square of a background, SIZE pixels a side."""
        files = background_files(self.root, held)
        image = things.background(files[rng.integers(len(files))], self.root / "small")
        side = int(rng.uniform(0.35, 1) * min(image.size))
        x, y = int(rng.integers(0, image.width - side + 1)), int(rng.integers(0, image.height - side + 1))
        return image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    def pages(self) -> list[Path]:
        """Pages rendered by `fetch`, those of documents that training may see."""
        return sorted((self.root / "pages" / "train").glob("*.png"))


def background_files(root: Path, held: bool) -> list[Path]:
    folders = (root / "gnome-backgrounds/usr/share/backgrounds/gnome", root / "plasma-workspace-wallpapers/usr/share/wallpapers")
    return things.backgrounds(folders, held)


def make(number: int, sources: Sources, held: bool = False, kind: str | None = None, unseen_names: bool = False) -> Picture:
    """Picture `number` of the training set, or of the held-out one: other numbers, other backgrounds, and the same names unless unseen_names."""
    rng = np.random.default_rng([number, 2 * held + 5])
    kinds = ("things", "words", "page") if sources.pages() else ("things", "words")
    kind = kind or str(rng.choice(kinds, p=(0.84, 0.12, 0.04)[:len(kinds)] if len(kinds) == 3 else (0.86, 0.14)))
    if kind == "page":
        return _page(rng, sources)
    if kind == "words":
        return _words(rng, sources, held)
    return _composite(rng, sources, held, unseen_names)


def _cells(rng: np.random.Generator, n: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Centres of n things, and the range of their sizes."""
    if n == 1:
        return [(rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75))], (0.4, 0.9)
    if n == 2:
        a, b = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
        return ([(0.25, a), (0.75, b)] if rng.random() < 0.6 else [(a, 0.25), (b, 0.75)]), (0.32, 0.5)
    four = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    return [four[i] for i in rng.permutation(4)[:n]], (0.3, 0.48)


def _composite(rng: np.random.Generator, sources: Sources, held: bool, unseen_names: bool) -> Picture:
    image = sources.background(rng, held).convert("RGBA")
    choice = things.known(sources.stamps)[int(unseen_names)]
    n = int(rng.choice([1, 2, 3, 4], p=[0.4, 0.36, 0.12, 0.12]))
    cells, sizes = _cells(rng, n)
    cover = np.full((SIZE, SIZE), -1)
    placed: list[Placed] = []
    for x, y in cells:
        while True:
            if rng.random() < 0.15:
                thing = things.shape(things.SHAPES[rng.integers(4)], list(things.COLOURS)[rng.integers(8)])
            else:
                thing = choice[rng.integers(len(choice))]
            if thing.noun not in [p.thing.noun for p in placed]:
                break
        cut = things.cut_out(thing)
        scale = rng.uniform(*sizes) * SIZE / max(cut.size)
        w, h = max(8, int(cut.width * scale)), max(8, int(cut.height * scale))
        cut = cut.resize((w, h), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = int(np.clip(x * SIZE - w / 2, 0, max(0, SIZE - w))), int(np.clip(y * SIZE - h / 2, 0, max(0, SIZE - h)))
        image.alpha_composite(cut, (left, top))
        solid = np.asarray(cut.getchannel("A")) > 100
        under = cover[top:top + h, left:left + w]
        under[solid[:under.shape[0], :under.shape[1]]] = len(placed)
        placed.append(Placed(thing, (left + w / 2) / SIZE, (top + h / 2) / SIZE))
    patches = cover.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    labels = np.full((GRID, GRID), -1)
    for i in range(n):
        labels[(patches == i).mean(-1) > 0.3] = i
    return Picture("things", image.convert("RGB"), placed, labels=labels)


def _words(rng: np.random.Generator, sources: Sources, held: bool) -> Picture:
    """One or two lines of a word each, large, on paper or on a background."""
    if rng.random() < 0.6:
        light = int(rng.integers(225, 256))
        image, ink = Image.new("RGB", (SIZE, SIZE), (light, light, int(light * rng.uniform(0.9, 1)))), tuple(int(v) for v in rng.integers(0, 90, 3))
    else:
        image = sources.background(rng, held)
        ink = (255, 255, 255) if np.asarray(image).mean() < 128 else (0, 0, 0)
    n = int(rng.integers(1, 3))
    words = [things.WORDS[i] for i in rng.permutation(len(things.WORDS))[:n]]
    draw = ImageDraw.Draw(image)
    labels = np.full((GRID, GRID), -1)
    for i, word in enumerate(words):
        face = things.font(int(rng.integers(40, 62)))
        width = draw.textlength(word, face)
        if width > SIZE - 12:
            face = things.font(int(face.size * (SIZE - 12) / width))
            width = draw.textlength(word, face)
        middle = SIZE / 2 + rng.uniform(-30, 30) if n == 1 else SIZE * (0.28, 0.72)[i] + rng.uniform(-12, 12)
        left = rng.uniform(4, max(5, SIZE - 4 - width))
        draw.text((left, middle), word, ink, face, anchor="lm")
        top, bottom = int((middle - face.size * 0.4) * GRID / SIZE), int((middle + face.size * 0.4) * GRID / SIZE)
        labels[max(0, top):bottom + 1, int(left * GRID / SIZE):int((left + width) * GRID / SIZE) + 1] = i
    return Picture("words", image, lines=words, labels=labels)


def _page(rng: np.random.Generator, sources: Sources) -> Picture:
    """A crop of a page of a document."""
    files = sources.pages()
    image = Image.open(files[rng.integers(len(files))]).convert("RGB")
    side = int(rng.uniform(0.3, 1) * min(image.size))
    x, y = int(rng.integers(0, image.width - side + 1)), int(rng.integers(0, image.height - side + 1))
    return Picture("page", image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC), labels=np.full((GRID, GRID), -1))

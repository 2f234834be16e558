"""Pictures with questions and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Asked:
    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One picture and what is asked about it."""

    name: str
    picture: Image.Image
    questions: list[Asked]


def scenes(n_questions: int, per_picture: int = 8) -> Iterator[Sample]:
    """Drawn scenes with seeds that no training ever saw, until there are n_questions."""
    from ..scenes import HELD_OUT, make_questions, make_scene

    left = n_questions
    for seed in HELD_OUT:
        if left <= 0:
            return
        scene = make_scene(seed)
        asked = [Asked(q.task, q.prompt, q.answer) for q in make_questions(scene, per_picture)][:left]
        left -= len(asked)
        yield Sample(str(seed), scene.draw(), asked)


def strange(n_questions: int, per_picture: int = 8) -> Iterator[Sample]:
    """The same under what no scene has: noise, checkers, inverted colours, a picture of stripes shining through."""
    for i, sample in enumerate(scenes(n_questions, per_picture)):
        yield Sample(sample.name, Image.fromarray(_spoil(np.asarray(sample.picture.convert("RGB")), i)), sample.questions)


def _spoil(pixels: np.ndarray, i: int) -> np.ndarray:
    rng = np.random.default_rng([i, 4])
    h, w, _ = pixels.shape
    y, x = np.mgrid[0:h, 0:w]
    size = int(rng.integers(6, 40))
    other = [
        lambda: rng.integers(0, 256, (h, w, 3)),
        lambda: np.where(((y // size + x // size) % 2)[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3)),
        lambda: 255 - pixels.astype(int),
        lambda: 127 + 127 * np.sin(2 * np.pi * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / size)[..., None] * rng.uniform(-1, 1, 3),
    ][i % 4]()
    share = 1.0 if i % 4 == 2 else rng.uniform(0.3, 0.6)
    return ((1 - share) * pixels + share * other).clip(0, 255).astype(np.uint8)


SUITES = {"scenes": scenes, "strange": strange}

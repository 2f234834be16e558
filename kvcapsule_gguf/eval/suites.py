"""Pictures with questions and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Asked:
    """answer None: whatever the model writes with its f16 cache."""

    task: str
    prompt: str
    answer: str | None


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


def folder(path: Path, limit: int, prompts: tuple[str, ...] = ("Describe the picture.", "What is in the picture?")) -> Iterator[Sample]:
    """Pictures of one's own; the model's answers with its f16 cache are the truth."""
    from ..chat.images import load

    files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")]
    if not files:
        raise ValueError(f"no pictures in {path}")
    for file in files[: max(1, limit // len(prompts))]:
        found = load(str(file))
        yield Sample(file.name, Image.frombytes("RGB", (found.width, found.height), found.rgb), [Asked("describe", p, None) for p in prompts])


SUITES = {"scenes": scenes, "strange": strange}

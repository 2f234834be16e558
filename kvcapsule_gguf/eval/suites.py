"""Pictures with questions and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


SUITES = {"scenes": scenes}

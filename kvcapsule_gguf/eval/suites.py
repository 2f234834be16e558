"""Pictures with questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from . import real
from .pictures import from_folder, readable
from .samples import Asked, Draw, Sample
from .vlm import EvalError


def scenes(n_questions: int, per_picture: int = 8, draw: Draw | None = None) -> Iterator[Sample]:
    """Drawn scenes with seeds that no training ever saw, until there are n_questions."""
    from ..scenes import HELD_OUT, make_questions, make_scene
    from ..scenes.drawing import draw_scene

    left = n_questions
    for seed in HELD_OUT:
        if left <= 0:
            return
        scene = make_scene(seed)
        asked = [Asked(q.task, q.prompt, q.answer) for q in make_questions(scene, per_picture)][:left]
        left -= len(asked)
        yield Sample(str(seed), [(draw or draw_scene)(scene)], asked)


def strange(n_questions: int, per_picture: int = 8, draw: Draw | None = None) -> Iterator[Sample]:
    """The same scenes in a hand that no training ever saw (strange.py)."""
    from .strange import draw_strange

    return scenes(n_questions, per_picture, draw or draw_strange)


def pairs(n_questions: int, per_picture: int = 8, draw: Draw | None = None) -> Iterator[Sample]:
    """Two drawn scenes at a time, which no training ever saw, and what is the same or different."""
    from ..scenes import HELD_OUT, compare_questions, make_scene
    from ..scenes.drawing import draw_scene

    left = n_questions
    for seed in HELD_OUT[::2]:
        if left <= 0:
            return
        both = make_scene(seed), make_scene(seed + 1)
        asked = [Asked(q.task, q.prompt, q.answer) for q in compare_questions(*both)][:min(left, per_picture)]
        left -= len(asked)
        yield Sample(f"{seed} and {seed + 1}", [(draw or draw_scene)(scene) for scene in both], asked)


def mixed_sizes(suite: str) -> Draw:
    """How a suite's pictures are drawn at the sizes that go with their seeds; what is drawn in another hand is stretched."""
    from ..scenes import size_of
    from ..scenes.drawing import draw_scene
    from .strange import draw_strange

    if suite == "strange":
        return lambda scene: draw_strange(scene).resize(size_of(scene.seed), Image.Resampling.BICUBIC)
    return lambda scene: draw_scene(scene, size_of(scene.seed))


class OwnPictures:
    """Pictures of one's own; the model's answers with its f16 cache are the truth. Those that cannot be read are left out."""

    prompts: tuple[str, ...] = ("Describe the picture.", "What is in the picture?")

    def __init__(self, path: Path, limit: int, per_picture: int, say: Callable[[str], None]) -> None:
        """limit: of the questions. Raises EvalError."""
        self.prompts, self.say = self.prompts[:per_picture], say
        self.path, self.pictures = path, from_folder(path, max(1, limit // len(self.prompts)), 0)
        self.questions = len(self.pictures) * len(self.prompts)

    def __iter__(self) -> Iterator[Sample]:
        """Raises EvalError when no picture can be read."""
        shown = 0
        for i, picture in readable(self.pictures, say=self.say):
            shown += 1
            self.questions = (shown + len(self.pictures) - i - 1) * len(self.prompts)
            yield Sample(picture.name, [picture.image], [Asked("describe", p, None) for p in self.prompts])
        if not shown:
            raise EvalError(f"{self.path} has no picture that can be read")
        self.questions = shown * len(self.prompts)


DRAWN: dict[str, Callable[..., Iterator[Sample]]] = {"scenes": scenes, "strange": strange, "pairs": pairs}
SUITES: dict[str, Callable[..., Iterator[Sample]]] = {**DRAWN, **{name: partial(real.samples, name) for name in ("composites", "pages", "photographs", "several", "words")}}

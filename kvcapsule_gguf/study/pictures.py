"""The pictures and questions of the study, encoded once by the model's own projector and kept in a cache folder.

Three models: the two demo models (drawn scenes), and the real decoder (scripts/real_decoder: photographs and named things).
Suites: `fit` is what tables and axes are fitted to; the demo models have `like` (other pictures of the same kinds) and `unlike` (of other kinds);
the real decoder has `composites`, the kind that is fitted to, and `photographs` and `pages`, which nothing is fitted to. Of these the study sees the
part `test`, and of photographs, which are few, `calibration` too; the sealed part is for the final table.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..train.images import Drawn

QUESTIONS = (  # about a picture that has none of its own
    "What is in the image?",
    "Read the text in the image.",
    "How many objects are there, and what colours are they?",
)


@dataclass(frozen=True)
class Asked:
    """before: tokens of the text before the picture; embd f32 [n, width]; questions: (tokens, how many of them are the answer).

    An answer of 0 tokens is whatever the model writes with an exact cache.
    """

    before: list[int]
    embd: np.ndarray
    width: int
    questions: list[tuple[list[int], int]]


def unlike(count: int, seed: int) -> Iterator[Image.Image]:
    """Checkers, salt and pepper, and scrambled scenes."""
    for i in range(count):
        rng, side = np.random.default_rng([seed, i, 7]), 336
        if i % 3 == 0:
            y, x = np.mgrid[0:side, 0:side] // int(rng.integers(3, 30))
            pixels = np.where(((x + y) % 2)[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3))
        elif i % 3 == 1:
            pixels = np.where(rng.random((side, side, 1)) < rng.uniform(0.05, 0.5), rng.integers(0, 2, (side, side, 1)) * 255, rng.integers(0, 256, 3))
        else:
            scene = Drawn(count, seed + 1)[i // 2 * 2].image.resize((side, side))
            tiles = np.asarray(scene).reshape(24, 14, 24, 14, 3).swapaxes(1, 2).reshape(576, 14, 14, 3)
            pixels = tiles[rng.permutation(576)].reshape(24, 24, 14, 14, 3).swapaxes(1, 2).reshape(side, side, 3)
        yield Image.fromarray(pixels.astype(np.uint8))


Item = tuple[Image.Image, list[tuple[str, str | None]]]


def demo_items(suite: str) -> Iterator[Item]:
    from ..eval.suites import scenes

    if suite == "fit":
        drawn = Drawn(96, 0)
        for i in range(len(drawn)):
            yield drawn[i].image, [(q, None) for q in drawn[i].questions or QUESTIONS]
    elif suite == "like":
        for sample in scenes(48 * 6, 6):
            yield sample.pictures[0], [(q.prompt, q.answer) for q in sample.questions]
    else:
        for image in unlike(48, 2000):
            yield image, [(q, None) for q in QUESTIONS]


def real_items(suites: Path, suite: str, sealed: bool) -> Iterator[Item]:
    """suites: what scripts/real_decoder puts together. A picture that is there in several sizes comes once."""
    parts = [("composites", "calibration")] if suite == "fit" else [(suite, "sealed" if sealed else "test")]
    if suite == "photographs" and not sealed:
        parts.append((suite, "calibration"))
    seen = set()
    for folder in (suites / name / part for name, part in parts):
        for entry in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            name = re.sub(r"\d+x\d+", "", entry["name"])
            if name in seen:
                continue
            seen.add(name)
            yield Image.open(folder / entry["pictures"][0]), [(prompt, answer) for _, prompt, answer in entry["questions"]]


@dataclass(frozen=True)
class Study:
    """A model and where its pictures come from; side: pixels of every picture, 0 as it is; sealed: the part that is opened once."""

    name: str
    decoder: Path
    mmproj: Path
    side: int
    real: Path | None = None
    sealed: bool = False

    def items(self, suite: str) -> Iterator[Item]:
        for image, questions in real_items(self.real, suite, self.sealed) if self.real else demo_items(suite):
            image = image.convert("RGB")
            yield image.resize((self.side, self.side)) if self.side else image, questions

    def stamp(self) -> str:
        """Another one for other files: a model in training is replaced in place."""
        digest = hashlib.sha256()
        for path in (self.decoder, self.mmproj):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]


def studies(demo: Path, real: Path | None) -> dict[str, Study]:
    """The three models, or two where the real decoder is not there; real: a folder with its two files and `suites`."""
    found = {
        "demo": Study("demo", demo / "kvdemo-8M-v1-F16.gguf", demo / "mmproj-kvdemo-8M-v1-F16.gguf", 336),
        "mrope": Study("mrope", demo / "mrope" / "kvdemo-mrope-8M-v1-F16.gguf", demo / "mrope" / "mmproj-kvdemo-mrope-8M-v1-F16.gguf", 448),
    }
    if real:
        name = "smollm2-135m-dinov2-small"
        found["real"] = Study("real", real / f"{name}-f16.gguf", real / f"mmproj-{name}.gguf", 0, real / "suites")
    return found


def asked(study: Study, suite: str, count: int, cache: Path) -> list[Asked]:
    """The first `count` pictures of a suite. Needs the built library the first time only. Raises EvalError."""
    path = cache / f"{study.name}-{suite}.pickle"
    known: list[Asked] = pickle.loads(path.read_bytes()) if path.exists() else []
    if len(known) < count:
        known += _encode(study, suite, len(known), count)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(known))
    return known[:count]


def _encode(study: Study, suite: str, start: int, count: int) -> Iterator[Asked]:
    from ..eval.prompts import Prompts
    from ..eval.vlm import Vlm

    vlm = Vlm(study.decoder, study.mmproj, 1)
    try:
        prompts = Prompts(vlm)
        for image, questions in islice(study.items(suite), start, count):
            read = vlm.read(prompts.before(), image)
            try:
                before, part, *after = read.parts if len(read.parts) > 1 else [[], *read.parts]
                tail = after[0] if after else []  # some models close a picture with a token of their own
                forms = [prompts.forced(q, a) if a is not None else None for q, a in questions]
                rows = [(f.tokens, f.n_answer) if f else (prompts.question(q), 0) for f, (q, _) in zip(forms, questions)]
                yield Asked(before, part.embd.copy(), part.width, [([*tail, *tokens], n) for tokens, n in rows])
            finally:
                read.free()
    finally:
        vlm.close()

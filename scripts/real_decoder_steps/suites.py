"""Puts the suites of real pictures together, from the packages, for kvcapsule-eval (kvcapsule_gguf/eval/real.py says how they lie)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import evaluate, questions, things
from .fetch import TRAIN
from .pictures import Sources, background_files, make
from .things import share

SEALED = 0.7  # from here on
LONGEST = 1024  # pixels a side
DESCRIBE = [("describe", "Describe the picture.", None), ("describe", "What is in the picture?", None)]
PHOTOGRAPHS = {
    "opencv-doc": (
        "aloeL.jpg", "baboon.jpg", "basketball1.png", "board.jpg", "box_in_scene.png", "building.jpg", "butterfly.png", "cards.png", "chicky_512.png", "fruits.jpg",
        "graf1.png", "home.jpg", "leuvenA.jpg", "messi5.jpg", "rubberwhale1.png", "scenetext01.jpg", "scenetext02.jpg", "scenetext04.jpg", "scenetext05.jpg",
        "scenetext06.jpg", "smarties.png", "squirrel_cls.jpg", "starry_night.jpg", "stuff.jpg", "plant.jpg", "boat.jpg", "newspaper.jpg",
        "pexels_double_decker_bus.jpg", "yolo.jpg", "sudoku.png",
    ),
    "scikit-image": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "color.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
}
SCANS = ("c02-22", "cardinal", "ccitt", "francais", "linn", "lichtenstein", "multipage", "skew", "typewriter")


@dataclass(frozen=True)
class Entry:
    """origin: what the split goes by; questions: (task, prompt, answer), with None for whatever the model writes with its f16 cache."""

    origin: str
    name: str
    pictures: list[Image.Image]
    questions: list[tuple[str, str, str | None]]


def part_of(origin: str) -> str:
    x = share(origin)
    return "calibration" if x < TRAIN else "test" if x < SEALED else "sealed"


def build(work: Path, out: Path) -> dict[str, dict[str, int]]:
    """Writes all suites. -> how many entries each part of each has."""
    sources = Sources(work / "x")
    made = {
        "photographs": photographs(work), "pages": pages(work), "composites": held_out(sources, "composites", 240),
        "words": held_out(sources, "words", 120), "several": held_out(sources, "several", 180),
    }
    return {name: _write(entries, out / name) for name, entries in made.items()}


def photographs(work: Path) -> Iterator[Entry]:
    for package, names in PHOTOGRAPHS.items():
        files = {f.name: f for f in sorted((work / "x" / package).rglob("*"), reverse=True) if f.name in names}
        for name, file in sorted(files.items()):
            yield Entry(f"photograph {name}", file.stem, [_small(Image.open(file))], list(DESCRIBE))
    for file in background_files(work / "x", held=True):
        origin = things.background_name(file)  # one wallpaper in several shapes
        yield Entry(f"background {origin}", f"{origin}-{file.parent.name}-{file.stem}", [_small(Image.open(file))], list(DESCRIBE))


def pages(work: Path, documents: int = 120) -> Iterator[Entry]:
    """Up to two pages of each document, and the scans. The first line of the text layer is what a page says."""
    import pypdfium2

    files = sorted((work / "x" / "texlive-pictures-doc").rglob("*.pdf"))
    scans = [f for f in sorted((work / "x" / "ocrmypdf").rglob("resources/*.pdf")) if f.stem in SCANS]
    for file in files[::max(1, len(files) // documents)] + scans:
        scan = file in scans
        with pypdfium2.PdfDocument(file) as document:
            for k in range(len(document) if scan else min(2, len(document))):
                page = document[k if scan else k * (len(document) // 2)]
                image = page.render(scale=LONGEST / max(page.get_size())).to_pil()
                text = file.with_suffix(".txt").read_text(encoding="utf-8") if scan and file.with_suffix(".txt").exists() else page.get_textpage().get_text_range()
                line = next((" ".join(t.split()) for t in text.splitlines() if len(t.split()) > 1), "")
                read = [("read", "What does the text say?", line[:120])] if line.isprintable() and line else []
                yield Entry(f"pdf {file.stem}", f"{file.stem}-{k}", [_small(image)], [*DESCRIBE, *read])


def held_out(sources: Sources, suite: str, n: int) -> Iterator[Entry]:
    """Of backgrounds and arrangements that training never saw. What `evaluate` asks is not among them."""
    nouns = evaluate.batches.all_nouns(sources.stamps)
    first = {"composites": 20_000, "words": 30_000, "several": 40_000}[suite]
    for i in range(n):
        rng = np.random.default_rng([13, first + i])
        count = int(rng.integers(2, 5)) if suite == "several" else 1
        shown = [make(first + 4 * i + j, sources, held=True, kind="words" if suite == "words" else "things") for j in range(count)]
        asked = questions.between(shown, rng, nouns) if count > 1 else questions.about(shown[0], rng, nouns)
        yield Entry(f"{suite} {i}", f"{i:03d}", [p.image for p in shown], [(q.task, q.text, q.answer) for q in asked])


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((LONGEST, LONGEST))
    return image


def _write(entries: Iterator[Entry], folder: Path) -> dict[str, int]:
    scratch = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    parts: dict[str, list[dict]] = {"calibration": [], "test": [], "sealed": []}
    for part in parts:
        (scratch / part).mkdir(parents=True)
    for entry in entries:
        part = part_of(entry.origin)
        files = [f"{entry.name}{f'-{i + 1}' if len(entry.pictures) > 1 else ''}.png" for i in range(len(entry.pictures))]
        for file, picture in zip(files, entry.pictures):
            picture.save(scratch / part / file)
        parts[part].append({"name": entry.name, "pictures": files, "questions": entry.questions})
    for part, listed in parts.items():
        (scratch / part / "questions.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return {part: len(listed) for part, listed in parts.items()}

"""Exact match on held-out scenes through llama.cpp itself: `python -m kvcapsule_gguf.demo_model.evaluate [--mrope]`."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..chat.files import find_mmproj, model_in
from ..runtime.errors import KVCapsuleError
from ..scenes import HELD_OUT, TASKS, Question, compare_questions, draw_scene, is_correct, make_questions, make_scene, size_of
from .native import MARKER, NativeModel

Hits = dict[str, list[bool]]
DEMO = Path(__file__).parents[1] / "demo"


def evaluate(model: NativeModel, scenes: int, questions: int, first: int = HELD_OUT.start, verbose: bool = False, mixed: bool = False) -> Hits:
    """Hits per task; an image is decoded once per scene, each question starts anew after it.

    mixed: pictures of the sizes that go with their seeds, and each two scenes are compared, too.
    """
    hits: Hits = defaultdict(list)
    for seed in range(first, first + scenes):
        scene = make_scene(seed)
        picture = np.asarray(draw_scene(scene, size_of(seed)) if mixed else draw_scene(scene))
        _ask(model, [picture], make_questions(scene, questions), hits, f"{seed}" if verbose else "")
        if mixed and (seed - first) % 2:
            before = make_scene(seed - 1)
            both = [np.asarray(draw_scene(before, size_of(seed - 1))), picture]
            _ask(model, both, compare_questions(before, scene), hits, f"{seed - 1} and {seed}" if verbose else "")
    return hits


def _ask(model: NativeModel, pictures: list[np.ndarray], questions: list[Question], hits: Hits, name: str) -> None:
    model.rewind()
    model.feed(f"USER: {MARKER * len(pictures)}", pictures, bos=True)
    image_end = model.past
    for question in questions:
        given = model.answer(model.feed(f"{question.prompt}\nASSISTANT:"))
        hits[question.task].append(is_correct(question, given))
        if name and not hits[question.task][-1]:
            print(f"{name} {question.prompt} -> {given} (right: {question.answer})")
        model.rewind(image_end)


def table(hits: Hits) -> str:
    """Markdown rows per task, then all, then all but reading words."""
    rows = ["| task | questions | exact match |", "|---|---|---|"]
    groups = [(t, hits[t]) for t in TASKS if hits.get(t)]
    groups += [("all", sum(hits.values(), [])), ("all but read", sum((v for t, v in hits.items() if t != "read"), []))]
    return "\n".join(rows + [f"| {name} | {len(v)} | {100 * np.mean(v):.1f} % |" for name, v in groups])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mrope", action="store_true", help="the second model: mixed sizes, and questions on two pictures")
    parser.add_argument("--folder", type=Path, help="folder that holds both GGUF files, default: where they are shipped")
    parser.add_argument("--first", type=int, default=HELD_OUT.start, help="seed of the first scene")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--questions", type=int, default=10, help="per scene")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-v", "--verbose", action="store_true", help="print every miss")
    args = parser.parse_args()
    folder = args.folder or (DEMO / "mrope" if args.mrope else DEMO)
    try:
        model = model_in(folder)
    except KVCapsuleError as error:
        parser.error(str(error))
    projector = find_mmproj(model, None)
    if projector is None:
        parser.error(f"{folder} holds no projector")
    native = NativeModel(model, projector, threads=args.threads)
    print(table(evaluate(native, args.scenes, args.questions, args.first, args.verbose, args.mrope)))


if __name__ == "__main__":
    main()

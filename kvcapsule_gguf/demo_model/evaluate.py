"""Exact match on held-out scenes through llama.cpp itself: `python -m kvcapsule_gguf.demo_model.evaluate`."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..scenes import HELD_OUT, TASKS, is_correct, make_questions, make_scene
from .native import MARKER, NativeModel


def evaluate(model: NativeModel, scenes: int, questions: int, first: int = HELD_OUT.start, verbose: bool = False) -> dict[str, list[bool]]:
    """Hits per task; the image is decoded once per scene, each question starts anew after it."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for seed in range(first, first + scenes):
        scene = make_scene(seed)
        model.rewind()
        model.feed(f"USER: {MARKER}", [np.asarray(scene.draw())], bos=True)
        image_end = model.past
        for question in make_questions(scene, questions):
            given = model.answer(model.feed(f"{question.prompt}\nASSISTANT:"))
            hits[question.task].append(is_correct(question, given))
            if verbose and not hits[question.task][-1]:
                print(f"{seed} {question.prompt} -> {given} (right: {question.answer})")
            model.rewind(image_end)
    return hits


def table(hits: dict[str, list[bool]]) -> str:
    """Markdown rows per task, then all, then all but reading words."""
    rows = ["| task | questions | exact match |", "|---|---|---|"]
    groups = [(t, hits[t]) for t in TASKS if hits.get(t)]
    groups += [("all", sum(hits.values(), [])), ("all but read", sum((v for t, v in hits.items() if t != "read"), []))]
    return "\n".join(rows + [f"| {name} | {len(v)} | {100 * np.mean(v):.1f} % |" for name, v in groups])


def main() -> None:
    demo = Path(__file__).parents[1] / "demo"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=demo, help="folder that holds both GGUF files")
    parser.add_argument("--first", type=int, default=HELD_OUT.start, help="seed of the first scene")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--questions", type=int, default=10, help="per scene")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-v", "--verbose", action="store_true", help="print every miss")
    args = parser.parse_args()
    mmproj = next(args.folder.glob("mmproj-*.gguf"))
    model = next(p for p in args.folder.glob("*.gguf") if not p.name.startswith("mmproj") and "kvcapsule" not in p.name)
    native = NativeModel(model, mmproj, threads=args.threads)
    print(table(evaluate(native, args.scenes, args.questions, args.first, args.verbose)))


if __name__ == "__main__":
    main()

"""Answers that llama.cpp gives about held-out pictures, word for word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import batches, questions, things
from .pictures import Picture, Sources, make

FIRST = 10_000  # no training and no check uses these held-out numbers


def asked(n: int, sources: Sources, unseen_names: bool = False, several: bool = False) -> Iterator[tuple[list[Picture], list[questions.Question]]]:
    """n rows of held-out pictures with all their questions; several: of 2 to 4 pictures."""
    nouns = batches.all_nouns(sources.stamps)
    if unseen_names:
        nouns = nouns + sorted({t.noun for t in things.known(sources.stamps)[1]})
    for row in range(n):
        rng = np.random.default_rng([11, row])
        count = int(rng.integers(2, 5)) if several else 1
        number = FIRST + 4 * row
        shown = [make(number + i, sources, held=True, kind="things" if unseen_names else None, unseen_names=unseen_names) for i in range(count)]
        yield shown, questions.between(shown, rng, nouns) if several else questions.about(shown[0], rng, nouns)


def exact(model: Path, mmproj: Path, rows: Iterator[tuple[list[Picture], list[questions.Question]]], threads: int = 1, say=print) -> dict[str, list[bool]]:
    """By task, whether greedy decoding writes exactly the answer."""
    from kvcapsule_gguf.eval.run import evaluate
    from kvcapsule_gguf.eval.samples import Asked, Sample
    from kvcapsule_gguf.eval.settings import rivals
    from kvcapsule_gguf.eval.vlm import Vlm

    vlm = Vlm(model, mmproj, threads)
    samples = (Sample(str(i), [p.image for p in shown], [Asked(q.task, q.text, q.answer) for q in some]) for i, (shown, some) in enumerate(rows))
    try:
        result = evaluate(vlm, samples, rivals(["f16"]), n_ctx=2048, max_questions=16)
    finally:
        vlm.close()
    found: dict[str, list[bool]] = {}
    for task, right in zip(result.task, result.settings[0].exact):
        found.setdefault(task, []).append(right)
    return found


def table(found: dict[str, list[bool]]) -> str:
    """A line for each task; the last for all."""
    every = [r for rs in found.values() for r in rs]
    lines = [f"| {task} | {len(rs)} | {100 * np.mean(rs):.0f} % |" for task, rs in sorted(found.items())]
    return "\n".join(["| questions | asked | right |", "|---|---|---|", *lines, f"| all | {len(every)} | {100 * np.mean(every):.0f} % |"])

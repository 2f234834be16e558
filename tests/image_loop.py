"""A client that shows one image after the other and forgets the oldest: does its memory stay flat?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llama_runner import Case, Result, Step, clear, forget, image, rss, seq_cp, seq_rm, set_pos, state_load, state_save, stats, text
from tiny_gguf import TinyModel

TINY = TinyModel(n_layer=4, n_head=4, n_head_kv=2, head=64, n_ff=64, n_vocab=32)
GRID, WORDS, KEEP, CHAPTER, LOOK = (12, 16), 4, 3, 25, 5
TOKENS = GRID[0] * GRID[1]
WORD_IDS = list(range(WORDS))


def steps(n: int) -> list[Step]:
    """n images with text behind each. The fourth last image goes each time; every fifth time there is a fork, every seventh a saved and restored sequence (at once: an
    older state would hold more images), and after 25 images all is cleared. Counts and memory are looked at after every fifth image."""
    out: list[Step] = []
    for i in range(n):
        at = i % CHAPTER
        if at == 0:
            out.append(clear())
        if at >= KEEP:
            start = (at - KEEP) * (TOKENS + WORDS)
            out.append(seq_rm(0, start, start + TOKENS))
        out += [image(GRID, seed=i), text(WORD_IDS)]
        if i % 5 == 4:
            out += [seq_rm(1, 0, -1), seq_cp(0, 1), text(WORD_IDS, seq=1), seq_rm(1, 0, -1), set_pos(1, 0)]
        if i % 7 == 6:
            out += [state_save("loop", 0), state_load("loop", 0)]
        if i % LOOK == LOOK - 1:
            out += [stats(), rss()]
    return [step if step["op"] in ("stats", "rss") else forget(step) for step in out]


def case(n: int, models: Callable[[TinyModel], Path], capsules: Callable[..., Path]) -> Case:
    model = models(TINY)
    return Case("loop", model, steps(n), capsule=capsules(model, tiers=(4, 8, 32)), quality=1.14, image_tokens=TOKENS, auto_compress=True, n_ctx=8192, n_hot=512, n_seq_max=2)


def growth(result: Result, warm_up: int) -> float:
    """Of the process's anonymous memory: the most after the first `warm_up` images over what it was then, less 1."""
    memory = result.values("rss")
    first = warm_up // LOOK
    return max(memory[first:]) / memory[first - 1] - 1

"""Automatic mode compresses images, and no audio or text that comes as embeddings."""

from __future__ import annotations

import pytest
from llama_runner import Case, cells, image, lossless_limit, nmse, set_pos, stats, text

GRID = (8, 8)
TOKENS = GRID[0] * GRID[1]


def counted(result) -> list[int]:
    return [s["n_cold"] for s in result.values("stats")]


@pytest.mark.parametrize("n", [5, 50, TOKENS - 1, TOKENS + 1, 2 * TOKENS - 3])
def test_positions_along_a_line(models, capsules, stock, patched, n):
    """The program says how many tokens an image has: what has not so many is none. Two images may follow each other."""
    model = models(arch="llama")
    sound = [text(4), image(n, seed=1), text(3)]
    steps = [*sound, stats(), image(GRID, seed=2), image(GRID, seed=3), text(3), stats()]
    result = patched([Case("a", model, steps, capsule=capsules(model), image_tokens=TOKENS, auto_compress=True, type_k="f32", type_v="f32")])["a"]
    extra = TOKENS if n > TOKENS else 0  # the first ones of a longer run may be an image
    assert counted(result) == [extra, extra + 2 * TOKENS]
    truth = stock([Case("a", model, [s for s in steps if s["op"] != "stats"], type_k="f32", type_v="f32")])["a"]
    assert nmse(result.logits(), truth.logits()) <= lossless_limit(False, "f32")


def test_m_rope(models, capsules, patched):
    """The tokens of an image share a position, those of other embeddings do not."""
    model = models(arch="qwen2vl")
    sound = cells([[4 + i, 4 + i, 4 + i, 1, i, 50] for i in range(50)])
    steps = [text(4), sound, set_pos(0, 54), text(3), stats(), image(GRID, seed=2), text(3), stats()]
    result = patched([Case("a", model, steps, capsule=capsules(model), auto_compress=True)])["a"]
    assert counted(result) == [0, TOKENS]

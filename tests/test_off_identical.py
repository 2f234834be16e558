"""Without a capsule the patched library is the stock one, bit by bit: logits, positions, state size."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from llama_runner import Case, clear, image, positions, seq_cp, seq_keep, seq_rm, state_load, state_save, text, together

ARCHS = ("llama", "qwen2", "qwen2vl")
GRID = list(product(ARCHS, (False, True), ("f16", "q8_0")))


def conversation(second_image: tuple[int, int] = (6, 10)) -> list[dict]:
    """Text and images, removals and a fork: all that a multimodal server does to a cache."""
    return [
        text(7), image((8, 8), seed=1), text(9, seed=1), text(6, seed=2, one_by_one=True),
        image(second_image, seed=2), text(5, seed=3), positions(),
        seq_cp(0, 1), text(4, seed=4, seq=1), text(4, seed=5), together({0: 3, 1: 9}), positions(1),
        seq_keep(1), text(3, seed=6, seq=1), state_save("a"), text(3, seed=7, seq=1), state_load("a"), text(3, seed=8, seq=1),
        seq_rm(1, 12, 20), text(4, seed=9, seq=1), clear(), text(5, seed=10), image((4, 4), seed=3), text(3, seed=11), positions(),
    ]


@pytest.fixture(scope="module")
def results(models, stock, patched):
    cases = [
        Case(f"{arch}-{fa}-{k}", models(arch=arch), conversation(), flash_attn=fa, type_k=k, n_seq_max=2, n_ubatch=48)
        for arch, fa, k in GRID
    ]
    return stock(cases), patched(cases)


@pytest.mark.parametrize(("arch", "fa", "type_k"), GRID)
def test_bit_identical(results, arch, fa, type_k):
    a, b = (r[f"{arch}-{fa}-{type_k}"] for r in results)
    assert np.array_equal(a.logits(), b.logits())
    assert a.values("positions") == b.values("positions")
    assert a.values("state_size") == b.values("state_size")


def test_the_image_matters(models, stock):
    """The oracle can fail: with another image the same conversation gives quite other logits."""
    runs = stock([Case(str(s), models(arch="llama"), [text(7), image((8, 8), seed=s), text(9, seed=1)]) for s in (1, 2)])
    a, b = (runs[s].logits(2) for s in ("1", "2"))
    assert ((a - b) ** 2).mean() > 0.5 * a.var()

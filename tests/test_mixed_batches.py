"""A batch with tokens and embeddings, which llama.cpp takes since October 2026: KVCAPSULE_TEST_API, see scripts/newer_llama_cpp."""

from __future__ import annotations

import os

import numpy as np
import pytest
from llama_runner import Case, compress, image, lossless_limit, mixed, nmse, stats, text

BATCHES = {
    "image, text": (image((8, 8), seed=1), text(9, seed=1)),
    "text, image, text": (text(5, seed=2), image((8, 8), seed=1), text(9, seed=1)),
    "two images": (image((8, 8), seed=1), image((8, 8), seed=2), text(3, seed=1)),
}
AFTER = 6 + 5  # tokens of the texts behind the batch
MODES = ("stock", "apart", "off", "compressed", "automatic")


@pytest.fixture(scope="module")
def results(models, capsules, stock, patched):
    if not os.environ.get("KVCAPSULE_TEST_API"):
        pytest.skip("the pinned llama.cpp takes no mixed batches")
    model = models(arch="llama")
    lossless = {"capsule": capsules(model), "n_hot": 512}
    after = [text(6, seed=3, one_by_one=True), image(16, seed=4), text(5, seed=5)]
    theirs, ours = [], []
    for name, parts in BATCHES.items():
        one = [text(4), mixed(*parts)]
        theirs += [Case(f"{name}: stock", model, [*one, *after]), Case(f"{name}: apart", model, [text(4), *parts, *after])]
        ours += [
            Case(f"{name}: off", model, [*one, *after]),
            Case(f"{name}: compressed", model, [*one, compress(), *after, stats()], **lossless),
            Case(f"{name}: automatic", model, [*one, *after, stats()], auto_compress=True, **lossless),
        ]
    return stock(theirs) | patched(ours)


@pytest.mark.parametrize("name", BATCHES)
def test_a_mixed_batch(results, name: str) -> None:
    stock, apart, off, compressed, automatic = (results[f"{name}: {mode}"] for mode in MODES)
    assert np.array_equal(off.logits(), stock.logits())
    # what stock makes of the same tokens in batches of their own: the logits of the texts behind them
    assert nmse(apart.logits()[-AFTER:], stock.logits()[-AFTER:]) <= lossless_limit(False)
    for mode in (compressed, automatic):
        assert nmse(mode.logits(), stock.logits()) <= lossless_limit(False)
        assert mode.values("stats")[-1]["n_cold"] >= 64 * sum(part["op"] == "image" for part in BATCHES[name])

"""What is not finite, or does not fit f16, is never taken into a slot: from an image, or from a saved state."""

from __future__ import annotations

import numpy as np
import pytest
from llama_runner import Case, compress, image, seq_rm, set_pos, state_fill, state_load, state_save, stats, text

GRID = (8, 8)
TOKENS = GRID[0] * GRID[1]
PATHS = ("", "unpack")
NAN = float("nan")


@pytest.mark.parametrize("path", PATHS)
def test_an_image_of_nan(models, capsules, patched, path):
    """It stays hot, with one line, and shows in the logits: a model that is broken does not look healthy. Other images are compressed."""
    model = models()
    steps = [text(4), image(GRID, seed=1), compress(), image(GRID, seed=2, scale=NAN), compress(), compress(), stats(), text(3)]
    result = patched([Case("a", model, steps, capsule=capsules(model, tiers=(8,)), env={"LLAMA_KVCAPSULE_PATH": path})])["a"]
    assert result.values("moved") == [TOKENS, 0, 0]
    seen = result.values("stats")[-1]
    assert (seen["n_cold"], seen["n_hot_vision"]) == (TOKENS, TOKENS)
    assert len([line for step in result.steps for line in step.log if "not finite" in line]) == 1
    assert np.isnan(result.logits(7)).all()


def test_what_a_wider_head_left_is_no_part_of_an_image(models, capsules, patched):
    """Heads of 60 channels are read into rows of 64, where heads of 64 of another model held NaN before: the padding counts for nothing."""
    wide, narrow = (models(head=d, n_head=2, n_head_kv=1, n_ff=64) for d in (64, 60))
    steps = [text(4), image(GRID, seed=2, scale=NAN), compress(), stats()]
    good = [text(4), image(GRID, seed=2), compress(), stats()]
    done = patched([Case("wide", wide, steps, capsule=capsules(wide, tiers=(8,))), Case("narrow", narrow, good, capsule=capsules(narrow, tiers=(8,)))])
    assert done["wide"].values("stats")[-1]["n_cold"] == 0
    assert done["narrow"].values("stats")[-1]["n_cold"] == TOKENS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fill", "hashed"), [(0xFF, True), (0x7B, True), (0xFF, False)], ids=["NaN", "too large", "wrong hash"])
def test_a_damaged_state_leaves_the_other_sequence_alone(models, capsules, patched, fill, hashed, path):
    """It is refused; not a bit of the other sequence's logits changes, in small batches or large ones."""
    model = models()
    both = [s for q in (0, 1) for s in (text(4, seed=q, seq=q), image(GRID, seed=q, seq=q), compress(q))]
    bad = state_fill("good", "bad", fill, hashed)
    load = [state_load("bad", 0, may_fail=True)]
    head = [*both, state_save("good", 0), bad, seq_rm(0, -1, -1), set_pos(0, 0)]
    tail = [text(300, seed=9, seq=1), text(4, seed=3, seq=1), state_load("good", 0), text(4, seed=4, seq=0), stats()]
    options = {"capsule": capsules(model, tiers=(8,)), "n_seq_max": 2, "n_hot": 1024, "n_ctx": 2048, "env": {"LLAMA_KVCAPSULE_PATH": path}}
    done = patched([Case("never", model, head + tail, **options), Case("tried", model, head + load + tail, **options)])
    assert done["tried"].steps[len(head)].rc == 1
    assert np.isfinite(done["tried"].logits()).all()
    assert np.array_equal(done["tried"].logits(), done["never"].logits())

"""Memory stays flat over many images (scripts/image_loop shows 300)."""

from __future__ import annotations

from image_loop import CHAPTER, KEEP, LOOK, TOKENS, case, growth


def test_memory_is_flat(models, capsules, patched):
    n = 3 * CHAPTER
    result = patched([case(n, models, capsules)])["loop"]
    seen = result.values("stats")
    assert [s["n_cold"] for s in seen] == [min(i % CHAPTER + 1, KEEP) * TOKENS for i in range(LOOK - 1, n, LOOK)]
    assert all(max(s["n_slots_tier"][tier] for s in seen) > 1 for tier in (0, 1)), "two tiers are in use"
    assert growth(result, 2 * CHAPTER) < 0.01

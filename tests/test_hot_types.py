"""Pictures in a quantized hot cache are compressed as those in f16 are."""

from __future__ import annotations

import pytest
from llama_runner import Case, compress, image, stats, text

TYPES = ["f16", "q8_0", "q4_0"]
GRID = (16, 16)


@pytest.fixture(scope="module")
def tiers(models, patched) -> dict[str, dict]:
    model = models(arch="llama", head=64)
    steps = [text(4), image(GRID, seed=1), text(2), compress(), stats(), text(4)]
    cases = [Case(kind, model, steps, capsule="auto", type_k=kind, type_v=kind, flash_attn=True) for kind in TYPES]
    return {name: result.values("stats")[0] for name, result in patched(cases).items()}


@pytest.mark.parametrize("kind", TYPES)
def test_a_quantized_hot_cache(tiers, kind):
    assert tiers[kind]["n_cold"] == GRID[0] * GRID[1]
    assert tiers[kind]["n_slots_tier"] == tiers["f16"]["n_slots_tier"]

"""Calibrates the guard: how bad the worst token of a block may be before the block goes to the faithful tier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..codec.block import BlockCodec
from ..codec.guard import block_score
from ..format.capsule import Capsule
from .store import BlockStore

PASS = 0.97  # share of the held-back blocks that keep the economy tier in all layers
MARGIN = 1.1  # on top: other pictures vary a little more


def scores(capsule: Capsule, store: BlockStore, tier: int) -> np.ndarray:
    """f32 [layers, B]: guard scores of the held-back blocks."""
    out = []
    for i, layer in enumerate(capsule.layers):
        k, v = store.blocks(i, "k", held=True), store.blocks(i, "v", held=True)
        k_hat, v_hat = BlockCodec.of(capsule, i, tier).round_trip(k, v)
        out.append(block_score(k, v, k_hat, v_hat, layer.k_query_weight))
    return np.stack(out)


def thresholds(score: np.ndarray, share: float = PASS, margin: float = MARGIN) -> np.ndarray:
    """score [layers, B] -> kappa [layers]: the lowest common quantile at which `share` of the blocks pass in every layer, times the margin."""
    ranked = np.sort(score, 1)
    low, high = 0, ranked.shape[1] - 1
    while low < high:
        middle = (low + high) // 2
        passed = (score <= ranked[:, middle : middle + 1]).all(0).mean()
        low, high = (low, middle) if passed >= share else (middle + 1, high)
    return ranked[:, low] * margin


def calibrate(capsule: Capsule, store: BlockStore, say: Callable[[str], None]) -> None:
    """Sets kappa of every economy tier."""
    for i, tier in enumerate(capsule.tiers):
        score = scores(capsule, store, i)
        if i:
            tier.kappa = [float(x) for x in thresholds(score)]
        bytes_per = capsule.slot_bytes(i) / capsule.block_size
        say(
            f"tier {tier.name}: {1 / (1 - tier.ratio):.2f}x smaller than f16 ({bytes_per:.0f} bytes a token), worst token of a block: "
            f"median {np.median(score.max(0)):.1f}, largest {score.max():.1f} times q4_0's error"
        )

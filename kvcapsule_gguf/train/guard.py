"""Calibrates the guard: how bad the worst token of a block may be before the block goes to the faithful tier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..codec.block import BlockCodec
from ..codec.guard import block_score
from ..codec.types import total_rows
from ..format.capsule import Capsule
from .schedule import DISTORTION
from .store import BlockStore

# a token whose error is that of 2 bits for all of it (in units of q4_0's), and of half of it lost: no economy tier may be worse, calibrated or not
COARSE = {True: DISTORTION["q2_0"] / DISTORTION["q4_0"], False: 0.5 / DISTORTION["q4_0"]}  # all rows kept / some rows dropped
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
        passed = 1.0
        if i:
            all_rows = min(map(total_rows, tier.key_rows + tier.value_rows)) == capsule.block_size
            kappa = np.minimum(thresholds(score), COARSE[all_rows])
            tier.kappa = [float(x) for x in kappa]
            passed = float((score <= kappa[:, None]).all(0).mean())
        say(
            f"tier {tier.name}: {1 / (1 - tier.ratio):.2f}x smaller than f16 ({capsule.slot_bytes(i) / capsule.block_size:.0f} bytes a token); "
            f"the worst token of a block has {np.median(score.max(0)):.1f} times q4_0's error (median), {100 * passed:.0f} % of the blocks pass"
        )

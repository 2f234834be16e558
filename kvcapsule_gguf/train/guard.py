"""Calibrates the guard: how bad the worst token of a block may be before the block goes to the faithful tier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..codec.guard import block_score
from ..codec.types import total_rows
from ..format.block import BlockCodec
from ..format.capsule import Capsule, Tier
from .schedule import DISTORTION
from .store import BlockStore

# a token whose error is that of 2 bits for all of it (in units of q4_0's), and of half of it lost: no economy tier may be worse, calibrated or not
COARSE = {True: DISTORTION["q2_0"] / DISTORTION["q4_0"], False: 0.5 / DISTORTION["q4_0"]}  # all rows kept / some rows dropped
PASS = 0.97  # share of the held-back blocks that keep the economy tier in all layers
MARGIN = 1.1  # on top: other pictures vary a little more


@dataclass
class Errors:
    """Relative squared error of the held-back blocks, by tier and layer; keys as queries see them. 1 = everything but the mean is lost."""

    capsule: Capsule
    key: dict[tuple[int, int], float] = field(default_factory=dict)
    value: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, tier: int, i: int, k: np.ndarray, v: np.ndarray, k_hat: np.ndarray, v_hat: np.ndarray) -> None:
        layer = self.capsule.layers[i]
        weight = layer.k_query_weight[:, None]
        self.key[tier, i] = float((np.square(k_hat - k) * weight).sum() / max((np.square(k - layer.k_mean[:, None]) * weight).sum(), 1e-30))
        self.value[tier, i] = float(np.square(v_hat - v).sum() / max(np.square(v - layer.v_mean[:, None]).sum(), 1e-30))

    def as_provenance(self) -> dict[str, list[float]]:
        """Lists [tier, layer], row-major."""
        order = [(t, i) for t in range(len(self.capsule.tiers)) for i in range(len(self.capsule.layers))]
        return {"key_error": [self.key[x] for x in order], "value_error": [self.value[x] for x in order]}


def scores(capsule: Capsule, store: BlockStore, tier: int, errors: Errors) -> np.ndarray:
    """f32 [layers, B]: guard scores of the held-back blocks."""
    out = []
    for i, layer in enumerate(capsule.layers):
        k, v = store.blocks(i, "k", held=True), store.blocks(i, "v", held=True)
        k_hat, v_hat = BlockCodec.of(capsule, i, tier).round_trip(k, v)
        errors.add(tier, i, k, v, k_hat, v_hat)
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


def finer(a: Tier, b: Tier, layer: int) -> bool:
    """Does tier `a` keep some of the first rows of the keys or values in better types than `b` does?"""
    return any((np.cumsum(x) > np.cumsum(y)).any() for x, y in ((a.key_rows[layer], b.key_rows[layer]), (a.value_rows[layer], b.value_rows[layer])))


def calibrate(capsule: Capsule, store: BlockStore, say: Callable[[str], None], weights: tuple[np.ndarray, np.ndarray] | None = None, share: float = PASS) -> None:
    """Sets kappa of every economy tier, and what the tiers cost in the provenance.

    share: of the held-back blocks, that pass in all layers; weights: sensitivities of the layers; one that costs little may be coarser in proportion.
    """
    errors = Errors(capsule)
    faithful = scores(capsule, store, 0, errors)
    for i, tier in enumerate(capsule.tiers):
        score = scores(capsule, store, i, errors) if i else faithful
        passed = 1.0
        if i:
            all_rows = min(map(total_rows, tier.key_rows + tier.value_rows)) == capsule.block_size
            slack = np.ones(len(capsule.layers)) if weights is None else np.maximum(1, 1 / np.maximum(*weights))
            # a refused block must be better off: nothing is refused that the faithful tier does no better
            kappa = np.minimum(np.maximum(thresholds(score, share), faithful.max(1)), COARSE[all_rows] * slack)
            smaller = capsule.ratio(i) >= capsule.ratio(0)
            kappa[[not (smaller and finer(capsule.tiers[0], tier, layer)) for layer in range(len(capsule.layers))]] = 0
            tier.kappa = [float(x) for x in kappa]
            passed = float(((score <= kappa[:, None]) | (kappa[:, None] <= 0)).all(0).mean())
        say(
            f"tier {tier.name}: {1 / (1 - tier.ratio):.2f}x smaller than f16 ({capsule.slot_bytes(i) / capsule.block_size:.0f} bytes a token); "
            f"the worst token of a block has {np.median(score.max(0)):.1f} times q4_0's error (median), {100 * passed:.0f} % of the blocks pass"
        )
    capsule.provenance |= errors.as_provenance()

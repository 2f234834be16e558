"""What becomes of the tokens at the right and at the bottom of a picture whose sides are no multiples of a tile's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..codec.cut import BlockShape
from ..codec.guard import block_score
from ..format.block import BlockCodec
from ..format.capsule import Capsule
from ..train.source import KVSample

Rule = Callable[[int, int], list[np.ndarray]]  # height and width of a picture -> its tokens, block by block


def shared(block: BlockShape) -> Rule:
    """The rule of docs/design/codec.md: pieces of tiles share blocks."""

    def cut(h: int, w: int) -> list[np.ndarray]:
        order = block.order(h * w, w)
        return [order[i : i + block.size] for i in range(0, h * w, block.size)]

    return cut


def alone(block: BlockShape) -> Rule:
    """Every piece of a tile is a block of its own."""
    tile_height = block.size // block.tile_width

    def cut(h: int, w: int) -> list[np.ndarray]:
        grid = np.arange(h * w).reshape(h, w)
        return [grid[y : y + tile_height, x : x + block.tile_width].ravel() for y in range(0, h, tile_height) for x in range(0, w, block.tile_width)]

    return cut


@dataclass
class Share:
    """Tokens by what they become, and bytes in units of one token in f16."""

    small: int = 0  # in whole blocks, economy tier
    refused: int = 0  # in whole blocks, faithful tier
    padded: int = 0
    hot: int = 0
    stored: float = 0.0

    @property
    def tokens(self) -> int:
        return self.small + self.refused + self.padded + self.hot

    def __str__(self) -> str:
        parts = (100 * x / self.tokens for x in (self.small, self.refused, self.padded, self.hot))
        return f"{self.tokens / self.stored:.2f}x | " + " | ".join(f"{x:.1f} %" for x in parts)


@dataclass
class Stored:
    """Pictures as a capsule would store them; a RoundTrip for study.measure."""

    capsule: Capsule
    tier: int
    rule: Rule
    share: Share = field(default_factory=Share)
    read: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # id of the exact keys -> keys and values as they are read

    def add(self, sample: KVSample) -> None:
        layers, n = self.capsule.layers, self.capsule.block_size
        out = [(k.copy(), v.copy()) for k, v in zip(sample.keys, sample.values)]
        for tokens in self.rule(len(sample.keys[0]) // sample.width, sample.width):
            if len(tokens) < n // 2:
                self.share.hot += len(tokens)
                self.share.stored += len(tokens)
                continue
            blocks = [self._block(i, sample, tokens) for i in range(len(layers))]
            tier = self.tier if len(tokens) == n and all(self._passes(i, *b) for i, b in enumerate(blocks)) else 0
            kind = "padded" if len(tokens) < n else "small" if tier else "refused"
            setattr(self.share, kind, getattr(self.share, kind) + len(tokens))
            self.share.stored += n * (1 - self.capsule.ratio(tier))
            for i, pair in enumerate(blocks):
                for x, y in zip(out[i], BlockCodec.of(self.capsule, i, tier).round_trip(*pair)):
                    x[tokens] = y[0].swapaxes(0, 1)[: len(tokens)]
        self.read |= {id(k): pair for k, pair in zip(sample.keys, out)}

    def __call__(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.read[id(k)]

    def _block(self, i: int, sample: KVSample, tokens: np.ndarray) -> list[np.ndarray]:
        """K and V [1, H, N, d]; the mean where there is no token."""
        layer, rest = self.capsule.layers[i], self.capsule.block_size - len(tokens)
        pairs = ((sample.keys[i], layer.k_mean), (sample.values[i], layer.v_mean))
        return [np.concatenate([x[tokens], np.repeat(mean[None], rest, 0)]).swapaxes(0, 1)[None] for x, mean in pairs]

    def _passes(self, i: int, k: np.ndarray, v: np.ndarray) -> bool:
        kappa = self.capsule.tiers[self.tier].kappa[i]
        done = BlockCodec.of(self.capsule, i, self.tier).round_trip(k, v)
        return kappa <= 0 or bool(block_score(k, v, *done, self.capsule.layers[i].k_query_weight)[0] <= kappa)


def crops(samples: Sequence[KVSample], least: int, seed: int = 0) -> list[KVSample]:
    """A random part of each picture, `least` tokens wide and high or more."""
    rng = np.random.default_rng(seed)
    out = []
    for s in samples:
        side = s.width, len(s.keys[0]) // s.width
        w, h = (int(rng.integers(least, n + 1)) for n in side)
        x, y = (int(rng.integers(0, n + 1 - part)) for n, part in zip(side, (w, h)))
        at = ((y + np.arange(h))[:, None] * s.width + x + np.arange(w)).ravel()
        out.append(replace(s, keys=[k[at] for k in s.keys], values=[v[at] for v in s.values], width=w))
    return out


def geometry(rule: Rule, block: BlockShape, sides: range) -> tuple[float, float, float, float]:
    """Shares of the tokens of all pictures of these sides: in whole tiles, in blocks of pieces, padded, hot."""
    count = np.zeros(4)
    for h in sides:
        for w in sides:
            whole = (h // (block.size // block.tile_width)) * (w // block.tile_width) * block.size
            sizes = np.array([len(b) for b in rule(h, w)])
            full, padded = sizes[sizes == block.size].sum(), sizes[(sizes < block.size) & (sizes >= block.size // 2)].sum()
            count += (whole, full - whole, padded, h * w - full - padded)
    return tuple(count / count.sum())  # type: ignore[return-value]

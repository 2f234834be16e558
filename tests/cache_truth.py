"""What a model of the cache implies: steps that evaluate a sequence afresh, and what K and V hold in layer 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cache_model import CacheModel, Token
from llama_runner import Step, cells, seq_rm, set_pos
from tiny_gguf import TinyModel, weights


def afresh(model: CacheModel, seq: int) -> list[Step]:
    """Steps that evaluate the cells of a sequence in order; gaps are filled, then cut (which only one layer forgives)."""
    rows, gaps, at = [], [], 0
    for c in model.of(seq):
        if not model.mrope and c.pos > at:
            gaps.append((at, c.pos))
            rows += [[p, p, p, 0] for p in range(at, c.pos)]
        rows.append([*c.order, c.token.id] + ([c.token.index, c.token.n] if c.token.vision else []))
        at = c.pos + 1
    return [cells(rows), *(seq_rm(0, p0, p1) for p0, p1 in gaps), set_pos(0, model.next(seq))]


_layers: dict[str, dict[str, np.ndarray]] = {}


def first_layer(model: TinyModel, tokens: Sequence[Token]) -> np.ndarray:
    """What the step `contents` must return: K and V of layer 0 follow from the token alone, [n, 8]."""
    w = _layers.setdefault(model.name, weights(model))
    images = {(t.id, t.n): None for t in tokens if t.vision}
    images = {(seed, n): np.random.default_rng(seed).standard_normal((n, model.n_embd)) for seed, n in images}
    x = np.array([images[t.id, t.n][t.index] if t.vision else w["token_embd.weight"][t.id] for t in tokens]).reshape(-1, model.n_embd)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["blk.0.attn_norm.weight"]
    return np.concatenate([x @ w[f"blk.0.attn_{k}.weight"][:4].T + w.get(f"blk.0.attn_{k}.bias", np.zeros(4))[:4] for k in "kv"], axis=1)
